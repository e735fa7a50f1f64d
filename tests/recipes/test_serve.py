"""The load test of the server counts what it sends."""

import json
import sys

import pytest
from helpers import dataset_layouts
from helpers.server import make_model, running


def test_the_load_test_counts_requests_errors_and_calls(script):
    serve = script("serve")

    class Running(serve.Server):
        def __init__(self, url):
            self.port, self.failed = int(url.rsplit(":", 1)[1]), 0

        def mebibytes(self):
            return 1.0

    with running(make_model(), max_characters=20) as url:
        found = serve.load(Running(url), ["a red boat"] * 50 + ["a" * 21] * 3, clients=8)
        assert found["errors"] == 3
        assert Running(url).metric("hf_xmc_texts_total") == 50
        assert Running(url).metric("hf_xmc_batch_texts_count") == pytest.approx(53 / found["texts_per_call"], rel=0.05)
    assert found["server_mib"] == dict.fromkeys(["start", "10 %", "50 %", "100 %"], 1.0)
    assert 0 < found["p50_ms"] <= found["p95_ms"]


@pytest.mark.slow
def test_the_load_test_runs_on_a_server_of_its_own(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_raw(tmp_path / "data")
    make_model().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--requests", "20"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments, "--clients", "4"])
    script("serve").main()
    *systems, log = map(json.loads, capsys.readouterr().out.splitlines())
    assert [system["system"] for system in systems] == ["predict", "predict", "serve"]
    assert systems[-1]["errors"] == log["errors_in_the_log"] == 0
