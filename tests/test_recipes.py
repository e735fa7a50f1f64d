"""The demo on other data in another layout, and the training script on two processes."""

import json
import os
import subprocess
import sys

import layouts
import pytest
from conftest import RECIPES
from test_sharding import launch

from hf_xmc import XMCModel

METRICS = {"P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10", "R@100"}
METRICS |= {"PSnDCG@5", "PSR@10", "PSR@100"}
FLAGS = ["--embedding_dim", "8", "--num_train_epochs", "2", "--validation_size", "0.3", "--use_cpu", "true"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    layouts.write_reference(tmp_path / "data")
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
    assert prediction.text in layouts.LABELS


def test_the_demo_runs_on_other_data(data, tmp_path):
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
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000


def test_the_training_script_runs_on_two_processes(data, tmp_path):
    recipe = [RECIPES / "train.py", RECIPES / "static.yaml", "--data", data, "--output_dir", tmp_path / "out"]
    mined = ["--label_mode", "mined", "--num_hard_negatives", "2", "--num_random_negatives", "3", "--mining_start", "1"]
    said = launch(2, *recipe, *FLAGS, *mined, "--per_device_train_batch_size", "2")
    assert "4 queries a step (2 process(es))" in said
    check(tmp_path / "out")


@pytest.mark.slow
def test_hidden_labels_are_added_by_text_and_measured_beside_the_others(data, tmp_path):
    command = [sys.executable, RECIPES / "zero_shot.py", "--data", data, "--output_dir", tmp_path / "zero_shot"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*command, "--share", "0.4", "--", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    report = json.loads((tmp_path / "zero_shot" / "zero_shot.json").read_text())
    assert (report["num_hidden"], report["num_seen"]) == (2, 3)
    assert {"labels and memory", "labels", "BM25", "the encoder before training"} < set(report["systems"])
    for metrics in report["systems"].values():
        assert all(0 <= metrics[column] <= 1 for column in report["columns"])
    assert done.stdout.count("| BM25 |") == 1
    model = XMCModel.from_pretrained(tmp_path / "zero_shot" / "model")
    assert len(model.labels) == 3  # what is saved knows nothing of the hidden ones
