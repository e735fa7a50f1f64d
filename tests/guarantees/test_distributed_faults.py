"""Two and three real processes, one of which dies, has no data or sees NaN."""

import re
import time

import pytest
import torch
from helpers import distributed_faults
from helpers.processes import torchrun
from helpers.tiny import HELPERS, make_bert

from hf_xmc.training import checkpoints

SCRIPT = HELPERS / "distributed_faults.py"


def launch(num_processes, *command):
    return torchrun(num_processes, SCRIPT, *command)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    bert = make_bert(tmp_path_factory.mktemp("bert"))
    done = launch(request.param, "all", bert, folder)
    assert done.returncode == 0, done.stderr[-5000:]
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]
    assert [result["world_size"] for result in results] == [request.param] * request.param
    return bert, results


@pytest.mark.promise("A run on several processes that is resumed ends bit for bit like an uninterrupted run")
@pytest.mark.parametrize("mode", distributed_faults.MODES)
def test_run_resumed_on_several_processes_ends_like_an_uninterrupted_one(mode, together, tally):
    """Dropout on; within an epoch and at its end; accumulated and not: see ``STOPS``."""
    _, results = together
    for rank, result in enumerate(results):
        whole, resumed = result["resume"][mode]
        for name, weight in whole.items():
            assert torch.equal(resumed[name], weight), f"rank {rank}: {name}"
    tally(faults=1)


@pytest.mark.promise("Processes train the same weights on uneven data, and with all positives in one shard")
@pytest.mark.parametrize("case", ["uneven", "one shard"])
def test_uneven_data_train_the_same_weights_on_all_processes(case, together, tally):
    _, results = together
    for result in results:
        found = result["uneven"][case]
        assert found["steps"] == 6
        assert found["moved"] > 0.01
        for name, weight in found["weights"].items():
            assert weight.isfinite().all()
            assert torch.equal(weight, results[0]["uneven"][case]["weights"][name]), name
    tally(faults=1)


@pytest.mark.promise("Evaluation of 97 and 99 rows on 2 and 3 processes equals that on one, to the last digit")
def test_evaluation_counts_each_row_once(together, tally, tmp_path):
    bert, results = together
    expected = distributed_faults.evaluation(bert, tmp_path)
    assert {name: found["eval_num_queries"] for name, found in expected.items()} == {
        f"{kind}, {rows}": rows for rows in (97, 99) for kind in ("static", "bert")
    }
    assert results[0]["evaluation"] == expected
    tally(inputs=len(expected))


@pytest.mark.promise("NaN in a single process skips the update, or stops the run, on all processes")
def test_nan_on_one_process_is_handled_on_all_of_them(together, tally):
    _, results = together
    for rank, result in enumerate(results):
        found = result["nonfinite"]
        assert found["steps"] == 6
        for name, weight in found["weights"].items():
            assert weight.isfinite().all()
            assert torch.equal(weight, results[0]["nonfinite"]["weights"][name]), name
        assert re.match(rf"Step 3, rank {rank}: .* are the rows \[\d+", found["message"])
        assert found["newest"] == "checkpoint-2"
    shown = [sorted(map(int, re.search(r"rows \[(.*?)\]", r["nonfinite"]["message"])[1].split(","))) for r in results]
    assert len({row for rows in shown for row in rows}) == sum(map(len, shown)), "the processes name the same rows"
    tally(faults=3)


@pytest.mark.promise("A process that dies or raises ends the job with a message and a complete checkpoint")
@pytest.mark.parametrize(
    ("way", "message"),
    [("killed", r"Signal 9 \(SIGKILL\)"), ("raised", "this process cannot go on")],
)
@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_job_ends_with_a_complete_checkpoint_when_a_process_dies(num_processes, way, message, tally, tmp_path):
    begin = time.monotonic()
    done = launch(num_processes, way, "-", tmp_path)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-3000:]
    assert time.monotonic() - begin < 240  # a set time, far below the half hour that is the default of torch
    assert checkpoints.latest_complete(tmp_path / "run").name == "checkpoint-3"
    tally(faults=1)


def test_fewer_labels_than_processes_are_refused(tmp_path):
    done = launch(2, "few labels", "-", tmp_path)
    assert done.returncode != 0
    assert "1 labels cannot be divided among 2 processes: start at most 1" in done.stderr
