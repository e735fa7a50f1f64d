"""Settings of the test session, and the fixtures that tests of several packages use."""

import functools
import gc
import importlib
import logging
import os
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share few cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which others than the kernels' tests do

import jinja2
import pytest
import torch
from datasets import Dataset
from helpers import guarantees
from helpers.tiny import LABELS, POSITIVES, RECIPES, make_bert, make_static_encoder
from tqdm import tqdm
from transformers import set_seed

RESULTS = {}  # of the tests of promises

torch.set_num_threads(1)

# Tests fork processes and kill them. A killed process would never release the multiprocessing lock of tqdm, and the
# monitor thread of tqdm could hold any lock at the moment of a fork.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

# Every saved encoder has a model card. Compiling its template takes longer than saving the encoder.
jinja2.Environment.compile = functools.lru_cache(maxsize=8)(jinja2.Environment.compile)


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_frozen():
    """Exclude imported modules from garbage collection, which every training runs."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded():
    """Start each test with the same random numbers, so that it does not depend on other tests or on chance."""
    set_seed(0)  # of random, numpy and torch


@pytest.fixture(autouse=True)
def logging_as_before():
    """Restore levels and handlers after each test: commands that run in the test process configure them."""
    loggers = [logging.getLogger(name) for name in (None, "hf_xmc", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(logger, logger.level, logger.handlers[:], logger.propagate, logger.disabled) for logger in loggers]
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)
    for logger, level, handlers, propagate, disabled in before:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script of the recipes by name."""
    for folder in (RECIPES, RECIPES / "benchmarks", RECIPES / "data", RECIPES / "paper"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


@pytest.fixture
def queries():
    texts = [f"text {number} about {' and '.join(LABELS[p] for p in ids)}" for number, ids in enumerate(POSITIVES)]
    return Dataset.from_dict({"text": texts, "label_ids": POSITIVES})


@pytest.fixture
def encoder():
    return make_static_encoder()


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def still_bert(tmp_path_factory):
    """Return the same transformer without dropout, for tests that compare gradients."""
    return make_bert(tmp_path_factory.mktemp("still"), dropout=0.0)


@pytest.fixture
def tally(request):
    """Return a counter of what a test of a promise survived, for ``runs/faults.json``."""
    request.node.tally = guarantees.Tally()
    return request.node.tally


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    promise = item.get_closest_marker("promise")
    if promise and (report.when == "call" or report.failed):
        counts = item.tally.counts if hasattr(item, "tally") else dict.fromkeys(guarantees.KINDS, 0)
        result = {"promise": promise.args[0], "passed": report.passed, **counts}
        report.user_properties.append(("promise", result))  # a worker of pytest-xdist sends its reports
    return report


def pytest_runtest_logreport(report):
    for name, result in report.user_properties:
        if name == "promise":
            RESULTS[report.nodeid] = result


def pytest_sessionfinish(session):
    if RESULTS and not hasattr(session.config, "workerinput"):  # not in the workers, which would all write the file
        guarantees.record(RESULTS)
