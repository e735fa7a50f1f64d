"""The script that proves the package on a GPU runs on a CPU, at a tiny size."""

import json
import os
import subprocess
import sys

import pytest
from helpers.processes import path
from helpers.tiny import RECIPES


def test_roofline_is_the_slower_of_arithmetic_and_memory(script):
    roofline = script("roofline")
    peak = roofline.Peak(float32=10, bfloat16=40, gigabytes=100)
    # 2 * 1000 * 10,000 * 500 = 1e10 operations a product, 1 ms at 10 TFLOP/s and 0.25 ms at 40.
    assert roofline.least_seconds(1000, 10_000, 500, False, peak) == pytest.approx(3e-3)
    assert roofline.least_seconds(1000, 10_000, 500, True, peak) == pytest.approx(1.5e-3)
    # One query: 10,001 rows of 2,000 bytes are read and written, at 100 GB/s.
    assert roofline.least_seconds(1, 10_000, 500, False, peak) == pytest.approx(2 * 10_001 * 2000 / 1e11)
    assert roofline.peak_of("NVIDIA A100-SXM4-80GB").gigabytes == 2039
    assert roofline.peak_of("NVIDIA H100 80GB HBM3") == roofline.PEAKS["H100"]
    assert roofline.peak_of("Tesla T4") is None


@pytest.mark.slow
def test_gpu_script_runs_on_a_cpu(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path(), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(RECIPES / "benchmarks" / "gpu.sh"), str(tmp_path / "gpu"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    logs = {log.name: log.read_text()[-1500:] for log in (tmp_path / "gpu").glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    report = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    names = ["inputs", "losses", "loss", "loss_1300k", "step", "minilm"]
    assert report["steps"] == dict.fromkeys(names, "0")
    assert len(report["losses"]["rows"]) == 3 * 4 * 2
    assert all(row["passed"] for row in report["losses"]["rows"])
    assert all(row["roofline_share"] > 0 for row in report["loss"])
    assert {row["mode"] for row in report["step"]} == {"exact", "fresh 0.5", "bank 0.5", "mined, 10 random"}
    assert report["minilm"]
    assert report["encoders"]["distilbert"].startswith("random weights")
