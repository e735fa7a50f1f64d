"""The demo on other data in another layout, and the training script on two processes."""

import json
import os
import subprocess
import sys

import pytest
from helpers import dataset_layouts
from helpers.processes import launch
from helpers.tiny import RECIPES, ROOT

from hf_xmc import XMCModel

METRICS = {"P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10", "R@100"}
METRICS |= {"PSnDCG@5", "PSR@10", "PSR@100"}
FLAGS = ["--embedding_dim", "8", "--num_train_epochs", "2", "--validation_size", "0.3", "--use_cpu", "true"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    many = [(f"{text} {number}", *others) for number in range(8) for text, *others in dataset_layouts.TRAIN]
    monkeypatch.setattr(dataset_layouts, "TRAIN", many)  # enough validation queries to calibrate
    (tmp_path / "data").mkdir()
    dataset_layouts.write_reference(tmp_path / "data")
    return tmp_path / "data"


def check(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    for way in ("labels", "memory"):
        assert set(metrics[way]) == METRICS
        assert all(0 <= value <= 1 for value in metrics[way].values())
    assert metrics["split"] == "test"
    assert metrics["train_seconds"] > 0
    assert metrics["memory_settings"]["validation"]["num_queries"] > 0
    calibration = metrics["calibration"]
    assert calibration["split"] == "test"
    assert 0 <= calibration["ECE@5"] <= 1
    assert {row["wanted"] for row in calibration["thresholds"]} <= {0.7, 0.8, 0.9}
    model = XMCModel.from_pretrained(folder / "model")
    assert model.calibration is not None
    assert set(model.labels["seen"]) <= {True, False}
    (prediction,) = XMCModel.from_pretrained(folder / "model").predict("a red boat", top_k=1)
    assert prediction.text in dataset_layouts.LABELS


def test_demo_runs_on_other_data(data, tmp_path):
    command = [sys.executable, RECIPES / "demo.py", "--data", data, "--output_dir", tmp_path / "out", "--", *FLAGS]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    check(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the boat" in page
    assert "P@5" in page
    assert "Probabilities" in page
    assert "ECE@5" in done.stdout
    assert page.count('<img src="data:image/svg+xml;base64,') >= 1


def test_training_script_runs_on_two_processes(data, tmp_path):
    script = [ROOT / "tests/helpers/run_and_count.py", RECIPES / "train.py"]
    recipe = [*script, RECIPES / "static.yaml", "--data", data, "--output_dir", tmp_path / "out"]
    mined = ["--label_mode", "mined", "--num_hard_negatives", "2", "--num_random_negatives", "3", "--mining_start", "1"]
    said = launch(2, *recipe, *FLAGS, *mined, "--per_device_train_batch_size", "2")
    assert "scores 4 queries on 2 processes" in said
    assert said.count("0 threads left") == 2  # a thread of Gloo that releases a tensor while Python exits aborts
    check(tmp_path / "out")
