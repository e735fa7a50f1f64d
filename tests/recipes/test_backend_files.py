"""The recipes that export an encoder for other backends, and compare backends. A stand-in replaces Optimum."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import dataset_layouts
from helpers.tiny import LABELS, RECIPES, make_bert_encoder

from hf_xmc import XMCModel, load_xmc
from hf_xmc.hub import manifest


def write_net(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "openvino_model.xml").write_text(content)
    (folder / "openvino_model.bin").write_text(content)


@pytest.fixture
def quantised(monkeypatch):
    """Calls of the quantiser, which a stand-in for Optimum records."""
    calls = []

    class OVQuantizer:
        @classmethod
        def from_pretrained(cls, model):
            assert model == "net"
            return cls()

        def quantize(self, rows, *, save_directory, ov_config):
            calls.append((rows, ov_config.quantization_config.num_samples))
            write_net(Path(save_directory) / "openvino", "int8")  # where sentence-transformers makes it save

    package = ModuleType("optimum.intel.openvino")
    package.OVQuantizer = OVQuantizer
    package.OVConfig = package.OVQuantizationConfig = SimpleNamespace
    for name in ("optimum", "optimum.intel"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return calls


@pytest.mark.parametrize("with_data", [True, False])
def test_openvino_files_are_added_and_listed(bert_folder, quantised, with_data, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    encoder = make_bert_encoder(bert_folder)
    XMCModel(encoder, LABELS).save_pretrained(folder)
    (tmp_path / "data").mkdir()
    dataset_layouts.write_raw(tmp_path / "data")
    monkeypatch.syspath_prepend(str(RECIPES / "serving"))
    export = importlib.import_module("export_backends")

    class Exported(list):
        tokenizer, max_seq_length = staticmethod(encoder.tokenizer), 5

        def save_pretrained(self, new):
            write_net(Path(new) / "openvino", "float32")

    def load(name, **settings):
        assert settings == {"backend": "openvino", "device": "cpu", "model_kwargs": {"export": True}}
        return Exported([SimpleNamespace(model="net")])

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
    data = ["--data", str(tmp_path / "data"), "--num_texts", "2"] if with_data else []
    monkeypatch.setattr(sys, "argv", ["export", str(folder), "--backend", "openvino", *data])
    export.main()

    expected = {f"openvino/openvino_model.{end}": "float32" for end in ("xml", "bin")}
    if with_data:
        expected |= {f"openvino/openvino_model_int8.{end}": "int8" for end in ("xml", "bin")}
        ((rows, num_samples),) = quantised
        texts = load_xmc(tmp_path / "data").train["text"][:2]
        wanted = [encoder.tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in texts]
        assert rows["input_ids"][:] == wanted  # cut, and not padded
        assert num_samples == len(wanted) == 2
    assert {str(path.relative_to(folder)): path.read_text() for path in (folder / "openvino").iterdir()} == expected
    assert set(expected) < set(manifest.read(folder / "xmc_config.json")["files"])


def test_quality_compares_scores_with_those_of_torch(script):
    base = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5, 6]])
    scores = base.clone()
    scores[0, 5] = 9  # column 5 enters the first five at the top, and column 4 leaves them
    relevance = np.zeros((2, 7), bool)
    relevance[0, [0, 4]] = relevance[1, [6, 5, 0]] = True
    quality = script("backends").quality
    same = {"P@1": 1.0, "P@5": 0.4, "max_difference": 0.0, "mean_difference": 0.0, "same_top_5": 1.0}
    assert quality(base, base, relevance) == same
    changed = {"P@1": 0.5, "P@5": 0.3, "max_difference": 8.0, "mean_difference": 0.57, "same_top_5": 0.9}
    assert quality(scores, base, relevance) == changed


def test_the_benchmark_measures_each_setting_against_torch(script, bert_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_raw(tmp_path / "data")
    folder = tmp_path / "model"
    arguments = ["--model", str(folder), "--make", str(bert_folder), "--data", str(tmp_path / "data"), "--rounds", "2"]
    half = {"model_kwargs": {"dtype": "bfloat16"}}
    monkeypatch.setattr(sys, "argv", ["backends.py", *arguments, "--settings", json.dumps(half)])
    script("backends").main()
    torch_row, half_row = map(json.loads, capsys.readouterr().out.splitlines())
    assert (torch_row["settings"], half_row["settings"]) == ({}, half)
    assert (torch_row["ratio"], torch_row["max_difference"], torch_row["same_top_5"]) == (1.0, 0.0, 1.0)
    assert 0 < half_row["mean_difference"] <= half_row["max_difference"] < 0.1
    assert half_row["texts"] == torch_row["texts"] > 0
    assert min(half_row["ratio"], half_row["cpu_seconds_per_1000_texts"]) > 0
