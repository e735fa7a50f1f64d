"""A text without a known token gets no label, and a warning counts such texts."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from helpers.tiny import LABELS

from hf_xmc import (
    Hierarchy,
    MemorySettings,
    XMCEvaluator,
    XMCModel,
    phrase_encoder,
    rewrite_phrases,
    standalone_encoder,
)
from hf_xmc.cli import main

UNKNOWN = ["\U0001f642", "\u4e2d\u6587\u6587\u672c", "\u2603 \u2603", "", " \n"]
TEXTS = ["a red boat", *UNKNOWN, "dog"]
SAID = "5 of 7 texts hold no token that the encoder knows: they get no label."


@pytest.fixture(params=["labels", "memory", "calibrated", "phrases"])
def model(request, encoder, queries):
    if request.param == "phrases":
        encoder = standalone_encoder(
            phrase_encoder(rewrite_phrases([*LABELS, *queries["text"]]), embedding_dim=8, device="cpu")
        )
    model = XMCModel(encoder, LABELS)
    if request.param in ("memory", "calibrated"):
        model.remember(queries.map(lambda row: {"text": f"old {row['text']}"}))
        model.memory.settings = MemorySettings(mix=0.5)
    if request.param == "calibrated":
        model.calibrate(queries)
    return model


def said(caplog):
    return [record.getMessage() for record in caplog.records if "no token" in record.getMessage()]


def test_unknown_text_gets_no_label_with_any_arguments(model, caplog):
    choices = [{}, {"hierarchy": Hierarchy({"0": ["4"]})}, {"deny": ["3"]}]
    choices += [{"threshold": 0.0}] if model.calibration is not None else []
    for choice in choices:
        caplog.clear()
        found = model.predict(TEXTS, **choice)
        assert [bool(labels) for labels in found] == [True, *[False] * 5, True]
        assert said(caplog) == [SAID]
    caplog.clear()
    assert model.predict(UNKNOWN[0]) == []
    assert said(caplog) == ["1 of 1 texts hold no token that the encoder knows: they get no label."]
    caplog.clear()
    assert model.predict("a red boat")
    assert not said(caplog)


def test_stream_reports_unknown_texts_once(model, caplog):
    answers = model.predict_stream(TEXTS[number % 7] for number in range(7 * 200))  # two blocks
    assert sum(map(bool, answers)) == 2 * 200
    assert said(caplog) == ["1000 of 1400 texts hold no token that the encoder knows: they get no label."]


def test_search_returns_padding_for_unknown_texts_and_evaluation_counts_them_as_wrong(model, encoder, caplog):
    found = model.search(TEXTS, 11)
    assert (found.label_ids[1:6] == -1).all()
    assert np.isneginf(found.scores[1:6]).all()
    assert (np.sort(found.label_ids[[0, 6]]) == np.arange(11)).all()
    assert said(caplog) == [SAID]
    relevance = sp.csr_array((np.ones(7), ([*range(7)], [0] * 7)), shape=(7, 11))
    evaluator = XMCEvaluator(TEXTS, relevance, LABELS, recall_at=(11,))
    # A query without a direction would find the labels in the order of their ids, label 0 first.
    assert evaluator(model.encoder)["R@11"] == pytest.approx(2 / 7)
    assert evaluator.score(found)["R@11"] == pytest.approx(2 / 7)


def test_explain_refuses_an_unknown_text(model):
    for text in UNKNOWN:
        with pytest.raises(ValueError, match="holds no token that the encoder knows: it gets no label"):
            model.explain(text, "0")


def test_unknown_token_next_to_known_ones_changes_nothing(encoder):
    model = XMCModel(encoder, LABELS)
    assert model.predict("boat \U0001f642") == model.predict("boat")


@pytest.mark.parametrize("way", ["mean", "max"])
def test_unknown_chunk_of_a_long_text_contributes_nothing(way, queries):
    encoder = standalone_encoder(phrase_encoder(rewrite_phrases(list(queries["text"])), embedding_dim=8, device="cpu"))
    model = XMCModel(encoder, LABELS)
    model.long_text = way
    words, unknown = "boat " * 512, "\u6587 " * 512
    for known in (words, words + unknown, unknown + words):
        found = model.predict(known, 11)
        assert [p.uid for p in found] == [p.uid for p in model.predict(words, 11)]
        assert [p.score for p in found] == pytest.approx([p.score for p in model.predict(words, 11)])
    assert model.predict(unknown * 2) == []


def test_labels_without_a_known_token_are_counted(encoder, caplog):
    model = XMCModel(encoder, LABELS)
    model.add_labels(["boat house", "\u8239", "\u732b"])
    assert "2 of 3 label texts have no token that the encoder knows" in caplog.text
    model.rename_label("0", "\u8239")
    assert "1 of 1 label texts have no token that the encoder knows" in caplog.text


def test_command_line_reports_unknown_texts(encoder, capsys, caplog, tmp_path):
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "model")
    assert main(["predict", str(tmp_path / "model"), "dog", UNKNOWN[0]]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(row["labels"]) for row in rows] == [5, 0]
    assert said(caplog) == ["1 of 2 texts hold no token that the encoder knows: they get no label."]
