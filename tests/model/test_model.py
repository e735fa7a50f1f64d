"""A saved model predicts the same after loading, and a modified one is refused."""

import json
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.tampering import forge
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder, several_texts
from sentence_transformers import SentenceTransformer

from hf_xmc import FaissIndex, MemorySettings, Prediction, XMCModel
from hf_xmc.model import answers

TEXTS = ["a red boat", "old oak tree", "dog and cat"]


@pytest.fixture
def model(encoder):
    return XMCModel(encoder, Dataset.from_dict({"uid": [f"L{i}" for i in range(11)], "text": LABELS}))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_predict_ranks_labels_by_dot_product(model, encoder):
    scores = encoder.encode(TEXTS[0]) @ encoder.encode(LABELS).T
    best = np.argsort(-scores)[:3]
    predictions = model.predict(TEXTS[0], top_k=3)
    assert [(p.uid, p.text) for p in predictions] == [(f"L{i}", LABELS[i]) for i in best]
    assert [p.score for p in predictions] == pytest.approx(scores[best].tolist())
    assert isinstance(predictions[0], Prediction)


def test_predict_returns_one_list_per_text(model):
    alone = model.predict(TEXTS[0], top_k=2)
    for found in (model.predict(TEXTS, top_k=2)[0], model.predict(["", TEXTS[0], " \n"], top_k=2)[1]):
        assert [p.text for p in found] == [p.text for p in alone]
        # One row and several are multiplied in another order.
        assert [p.score for p in found] == pytest.approx([p.score for p in alone], rel=1e-5)
    assert model.predict([]) == []
    assert model.predict(["", " \n"], top_k=2) == [[], []]
    assert len(model.predict(TEXTS[0], top_k=100)) == 11


def test_predict_stream_answers_block_by_block(model):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield TEXTS[number % 3]

    answers = model.predict_stream(endless(), 2)
    first = [next(answers) for _ in range(1030)]
    assert len(read) == 2 * 1024
    for place, expected in enumerate(model.predict(TEXTS, 2)):
        for found in (first[place], first[1026 + place]):
            assert [p.uid for p in found] == [p.uid for p in expected]


def test_progress_bar_counts_texts_of_slow_predictions(model, capsys, monkeypatch):
    model.predict(TEXTS, show_progress_bar=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(answers, "PROGRESS_DELAY", 0.0)
    model.predict(TEXTS, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err
    model.predict(TEXTS)
    assert capsys.readouterr().err == ""


def test_search_respects_allow_and_deny(model):
    everything = model.search(TEXTS[:1], 11).label_ids[0].tolist()
    assert model.search(TEXTS[:1], 11, deny=everything[:1]).label_ids[0].tolist() == [*everything[1:], -1]
    assert sorted(model.search(TEXTS[:1], 2, allow=[4, 7]).label_ids[0].tolist()) == [4, 7]


@pytest.mark.parametrize("kind", ["static", "bert"])
def test_saved_model_predicts_the_same(kind, bert_folder, tmp_path):
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder)
    model = XMCModel(encoder, LABELS)
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.predict(TEXTS) == model.predict(TEXTS)
    assert torch.equal(again.index.embeddings, model.index.embeddings)


def test_seen_is_kept_if_it_is_known(encoder, model, tmp_path):
    seen = [True, False] * 5 + [True]
    table = model.labels.add_column("seen", seen).add_column("color", ["red"] * 11)
    XMCModel(encoder, table).save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model")
    assert again.labels["seen"][:] == seen
    assert again.labels.column_names == ["uid", "text", "seen"]
    assert again.predict(TEXTS) == model.predict(TEXTS)
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").labels.column_names == ["uid", "text"]


def test_save_pretrained_replaces_an_old_model_completely(model, saved):
    model.save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert XMCModel.from_pretrained(saved).predict(TEXTS) == model.predict(TEXTS)


def test_failed_save_keeps_the_old_model(model, saved, monkeypatch):
    before = model.predict(TEXTS)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_xmc.hub.release.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert XMCModel.from_pretrained(saved).predict(TEXTS) == before


def test_save_pretrained_refuses_a_folder_of_something_else(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no saved XMCModel"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "modules.json", "label_index/labels.parquet", "label_index/embeddings.safetensors"]
)
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_modified_file_is_refused(saved, name, damage):
    path = next(saved.rglob(name.rsplit("/", maxsplit=1)[-1]))
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    expected = "missing" if damage == "missing" else "not the file that was saved"
    with pytest.raises(ValueError, match=f"{path.name} is {expected}"):
        XMCModel.from_pretrained(saved)


def test_card_may_be_edited(saved, model):
    (saved / "README.md").write_text("# Mine")
    assert XMCModel.from_pretrained(saved).predict(TEXTS) == model.predict(TEXTS)


def test_the_output_dir_of_a_training_stands_for_its_model(saved, model, tmp_path):
    assert saved.parent == tmp_path
    assert XMCModel.from_pretrained(tmp_path).predict(TEXTS) == model.predict(TEXTS)
    (saved / "xmc_config.json").unlink()
    with pytest.raises(ValueError, match=r"model has a label_index but no xmc_config.json"):
        XMCModel.from_pretrained(str(tmp_path))


def test_a_training_without_a_saved_model_is_refused_with_its_checkpoints(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-10 of a training.*from_pretrained\('.*checkpoint-10', l"):
        XMCModel.from_pretrained(tmp_path)


def test_folder_without_a_model_is_refused(saved, encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        XMCModel.from_pretrained(tmp_path / "nothing")
    forge(saved, format_version=99)
    with pytest.raises(ValueError, match="has format 99; this version of hf_xmc reads format 1"):
        XMCModel.from_pretrained(saved)
    (saved / "xmc_config.json").unlink()
    with pytest.raises(ValueError, match=r"a label_index but no xmc_config.json: it was not saved, or not uploaded"):
        XMCModel.from_pretrained(saved)
    assert SentenceTransformer(str(saved)).get_embedding_dimension() == 16
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no xmc_config.json, and does not load as a model of sentence-transf"):
        XMCModel.from_pretrained(tmp_path / "empty")


def test_plain_encoder_loads_with_a_hint_to_index_labels(encoder, tmp_path, caplog):
    encoder.save_pretrained(str(tmp_path / "plain"))
    model = XMCModel.from_pretrained(tmp_path / "plain")
    assert (
        "an encoder without labels, and predicts nothing yet: XMCModel.from_pretrained(name, labels=[...])"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"the model has no label to predict: .* `hf-xmc index name --labels FILE"):
        model.predict(TEXTS)
    labelled = XMCModel.from_pretrained(tmp_path / "plain", labels=LABELS)
    assert labelled.predict(TEXTS) == XMCModel(encoder, LABELS).predict(TEXTS)
    model.save_pretrained(tmp_path / "unlabelled")
    again = XMCModel.from_pretrained(tmp_path / "unlabelled")
    assert (len(again.labels), again.encoder.encode("boat").tolist()) == (0, encoder.encode("boat").tolist())
    assert not (tmp_path / "unlabelled" / "label_index").exists()


def test_given_labels_replace_the_saved_ones(saved, encoder):
    (saved / "label_index" / "embeddings.safetensors").unlink()  # they are not read
    model = XMCModel.from_pretrained(saved, labels=["boat", "oak"])
    assert model.predict(TEXTS) == XMCModel(encoder, ["boat", "oak"]).predict(TEXTS)
    assert len(model.labels) == 2
    (saved / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was saved"):
        XMCModel.from_pretrained(saved, labels=["boat", "oak"])


def test_unknown_part_and_old_library_are_refused(saved):
    about = json.loads((saved / "xmc_config.json").read_text())
    assert about["requires"] == ["sentence-transformers>=6.2"]
    assert about["requires"][0] in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    forge(saved, requires=["sentence-transformers>=99"])
    with pytest.raises(ValueError, match="sentence-transformers>=99 is required"):
        XMCModel.from_pretrained(saved)
    forge(saved, requires=about["requires"], parts={**about["parts"], "wings": {}})
    with pytest.raises(ValueError, match="holds wings, which this version does not know: update hf_xmc"):
        XMCModel.from_pretrained(saved)
    forge(saved, parts={**about["parts"], "calibration.json": {}})
    with pytest.raises(ValueError, match=r"names no file of calibration.json: the model is incomplete"):
        XMCModel.from_pretrained(saved)


def test_repr_shows_encoder_labels_index_memory_and_calibration(encoder, queries, bert_folder, caplog):
    table, _ = several_texts()
    model = XMCModel(encoder, table)
    model.index = FaissIndex(model.index.embeddings, "HNSW4")
    model.remember(queries)
    model.calibrate(queries)
    assert repr(model) == (
        "XMCModel(\n"
        "  encoder: StaticEmbedding, 16 dimensions, dot product\n"
        "  labels: 11 with 20 texts, searched by FaissIndex\n"
        "  memory: 13 queries, calibrated\n"
        ")"
    )
    caplog.clear()
    model.memory.settings = MemorySettings(neighbors=2)  # which ends the calibration
    assert "13 queries, not calibrated" in repr(model)
    assert not caplog.records  # to look at a model changes nothing and warns of nothing
    plain = repr(XMCModel(SentenceTransformer(str(bert_folder), device="cpu")))
    assert "encoder: Transformer, Pooling, " in plain
    assert "labels: 0, searched by LabelIndex" in plain


def test_bad_input_says_what_was_got(encoder, model):
    with pytest.raises(ValueError, match="`labels` must hold at least one label, got none"):
        XMCModel(encoder, [])
    with pytest.raises(ValueError, match=r"`embeddings` must have shape \(11, 16\), .* got \(3, 16\)"):
        XMCModel(encoder, LABELS, torch.zeros(3, 16))
    with pytest.raises(ValueError, match="an iterator of texts, got the single text 'a boat'"):
        next(model.predict_stream("a boat"))
    with pytest.raises(ValueError, match=r"an iterator of texts, got a DataFrame\."):
        model.predict(pd.DataFrame({"text": ["a boat"]}))
    with pytest.raises(ValueError, match="text 1 must be a string, got NoneType"):
        model.predict(["a", None])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        model.predict("a", top_k=0)
