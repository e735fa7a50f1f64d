"""Saved files and folders have the mode that the umask gives."""

import os
import stat

import pytest
from helpers import dataset_layouts
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from sentence_transformers.sentence_transformer.modules import Dense

from hf_xmc import BCELoss, FaissIndex, XMCModel, XMCTrainer, XMCTrainingArguments, load_xmc
from hf_xmc.cli import main
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.storage.folders import give_default_modes


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids="{:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_default_modes(folder, umask, *, at_least):
    paths = [folder, *folder.rglob("*")]
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}
    assert found == expected
    assert len([path for path in paths if path.is_file()]) >= at_least


def test_saved_model_follows_the_umask(umask, queries, bert_folder, tmp_path):
    encoder = make_bert_encoder(bert_folder)
    encoder.append(Dense(16, 16))
    model = XMCModel(encoder, LABELS)
    model.remember(queries)
    model.calibration = Calibration((0.0, 1.0), (0.1, 0.9))
    model.index = FaissIndex(model.index.embeddings, "HNSW4")
    for _ in range(2):  # the second takes the place of the first
        model.save_pretrained(tmp_path / "parent" / "model")
        assert_default_modes(tmp_path / "parent", umask, at_least=13)
    assert len(list((tmp_path / "parent").rglob("*.safetensors"))) == 5


def test_checkpoints_and_final_model_follow_the_umask(umask, queries, tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "load_report.txt").touch(mode=0o600)
    args = XMCTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=1, save_steps=1, label_mode="fresh"
    )
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, loss=BCELoss())
    trainer.train()
    assert_default_modes(tmp_path / "run" / "checkpoint-1", umask, at_least=8)
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert_default_modes(tmp_path / "elsewhere", umask, at_least=4)
    written = [path for path in (tmp_path / "run").iterdir() if path.is_file() and path.name != "load_report.txt"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}
    for path, mode in ((tmp_path / "run", 0o700), (tmp_path / "run" / "load_report.txt", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, "it was not ours to change"


def test_prepared_data_and_command_line_output_follow_the_umask(umask, tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    dataset_layouts.write_raw(tmp_path / "raw")
    load_xmc(tmp_path / "raw").save(tmp_path / "out" / "data")
    make_static_encoder().save_pretrained(str(tmp_path / "encoder"))
    (tmp_path / "labels.txt").write_text("boat\ncar\n")
    commands = [
        ["prepare", tmp_path / "raw", tmp_path / "out" / "prepared"],
        [
            "index",
            tmp_path / "encoder",
            "--labels",
            tmp_path / "labels.txt",
            "--output_dir",
            tmp_path / "out" / "model",
        ],
        ["predict", tmp_path / "out" / "model", "a red boat", "--output", tmp_path / "out" / "found.jsonl"],
    ]
    for command in commands:
        assert main(list(map(str, command))) == 0
    assert_default_modes(tmp_path / "out", umask, at_least=20)


def test_modes_of_link_targets_are_unchanged(tmp_path):
    (tmp_path / "mine").touch(mode=0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "folder" / "broken").symlink_to(tmp_path / "missing")
    give_default_modes(tmp_path / "folder", (tmp_path / "folder").iterdir())
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o600
    assert len(list((tmp_path / "folder").iterdir())) == 2
