"""A text in the memory does not vote for itself in tuning, calibration and thresholds."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES, make_bert_encoder, relevance_of

from hf_xmc import FaissIndex, LabelIndex, MemorySettings, TopK, TrainingMemory, XMCModel
from hf_xmc.metrics.calibration import Calibration, choose_threshold
from hf_xmc.model.own_votes import own_rows
from hf_xmc.search.overlap import equal_embeddings, equal_texts


def test_equal_texts_give_their_pairs():
    assert equal_texts(["boat", "car", "boat"], ["dog", "boat", "boat"]).tolist() == [[1, 0], [1, 2], [2, 0], [2, 2]]
    assert equal_texts([], ["dog"]).shape == (0, 2)


@pytest.mark.parametrize("index", [LabelIndex, FaissIndex])
def test_equal_embeddings_give_all_pairs_in_half_precision(index):
    rng = np.random.default_rng(0)
    known = torch.from_numpy(rng.normal(size=(50, 33)).astype(np.float32))
    known[10:30] = known[3]  # more than are looked at first
    queries = torch.stack([7.3 * known[3], known[41], known[41] + 0.02 * known[42], torch.zeros(33)])
    memory = TrainingMemory(known.half(), relevance_of(POSITIVES * 4)[:50], index=index)
    pairs = equal_embeddings(memory.index, queries)
    assert sorted(map(tuple, pairs.tolist())) == [(0, row) for row in (3, *range(10, 30))] + [(1, 41)]
    assert equal_embeddings(memory.index, queries[:0]).shape == (0, 2)


def others(queries, rows):
    """Return a model's memory without some rows, as if it had never held them."""
    return queries.select([row for row in range(len(queries)) if row not in rows])


def expected(encoder, queries, k):
    """Return the best labels of each query by a memory of all other queries."""
    rows = []
    for row in range(len(queries)):
        model = XMCModel(encoder, LABELS)
        model.remember(others(queries, {row}))
        model.memory.settings = MemorySettings(neighbors=3, mix=0.6, first_discount=0)
        rows.append(model.search([queries["text"][row]], k))
    return TopK(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


@pytest.fixture
def model(encoder, queries):
    model = XMCModel(encoder, LABELS)
    model.remember(queries)
    model.memory.settings = MemorySettings(neighbors=3, mix=0.6, first_discount=0)
    return model


def test_leave_one_out_search_equals_a_memory_of_the_others(model, encoder, queries, caplog):
    texts = list(queries["text"])
    found, wanted = model.search(texts, 11, leave_one_out=True), expected(encoder, queries, 11)
    np.testing.assert_array_equal(found.label_ids, wanted.label_ids)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3)
    assert "13 of 13 texts are in the memory: their own votes are left out" in caplog.text
    assert (model.search(texts, 11).scores != found.scores).any()
    caplog.clear()
    model.search(["a red boat"], 11, leave_one_out=True)
    assert not caplog.records


def test_calibration_thresholds_and_tuning_exclude_own_votes(model, encoder, queries, caplog):
    relevance, wanted = relevance_of(POSITIVES), expected(encoder, queries, 11)
    model.calibrate(queries)
    by_hand = Calibration.fit(wanted, relevance, 5)
    assert model.calibration.probabilities == pytest.approx(by_hand.probabilities)
    assert model.calibration.scores == pytest.approx(by_hand.scores, rel=1e-3)
    threshold = model.threshold_for(queries, precision=0.6)
    probable = TopK(wanted.label_ids, by_hand(wanted.scores))
    assert threshold == pytest.approx(choose_threshold(probable, relevance, precision=0.6), rel=1e-2)
    assert caplog.text.count("13 of 13 texts are in the memory") == 2
    # With its own vote each query finds its labels by the memory alone: no other setting could be better.
    assert model.memory.tune(model.embed(list(queries["text"])), relevance, model.label_index)["validation"]["P@1"] == 1
    tuned = model.tune_memory(queries)["validation"]
    assert tuned["P@1"] < 1
    assert "13 of 13 texts are in the memory" in caplog.text


@pytest.mark.filterwarnings("error")
def test_memory_without_votes_leaves_the_label_scores(encoder, queries):
    plain, texts = XMCModel(encoder, LABELS), ["a red boat", "dog"]
    for rows, leave_one_out in (([], False), ([], True), ([3], True)):
        model = XMCModel(encoder, LABELS)
        model.remember(queries.select(rows))
        found = model.search(queries["text"][3:4] if rows else texts, 11, leave_one_out=leave_one_out)
        expected = plain.search(queries["text"][3:4] if rows else texts, 11)
        np.testing.assert_array_equal(found.label_ids, expected.label_ids)


def test_text_is_found_in_the_memory_with_any_encoder(encoder, queries):
    model = XMCModel(encoder, LABELS)
    model.remember(Dataset.from_dict({"text": ["old BOAT", "dog", "dog"], "label_ids": [[0], [4], [5]]}))
    own = own_rows(model.memory, ["Old boat", "dog", "cat"], model.embed(["Old boat", "dog", "cat"]))
    assert own.tolist() == [[0, 0], [1, 1], [1, 2]]
    model.memory.texts = None
    again = own_rows(model.memory, ["Old boat", "dog"], model.embed(["Old boat", "dog"]))
    assert again.tolist() == [[0, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("way", ["mean", "max"])
def test_long_text_is_found_in_the_memory_by_every_chunk(way, bert_folder):
    model = XMCModel(make_bert_encoder(bert_folder), LABELS)
    long = " ".join(LABELS[n % 11] for n in range(40))
    texts = ["a red boat", long, "dog"]
    model.remember(Dataset.from_dict({"text": texts, "label_ids": [[0], [2], [4]]}))
    model.memory.settings = MemorySettings(mix=1, neighbors=1)
    model.long_text = way  # it was remembered cut, and is read in chunks now
    found = model.search(texts, 11, leave_one_out=True).label_ids
    for row, own in enumerate((0, 2, 4)):
        assert own not in found[row]
        assert (found[row] >= 0).any()


def test_every_change_of_the_memory_removes_the_calibration(model, queries, caplog):
    def other_settings():
        model.memory.settings = MemorySettings(mix=0.1)

    def add():
        model.memory.add(np.ones((1, 16), np.float32), relevance_of(POSITIVES)[:1], ["a text"])

    def replace():
        model.memory = TrainingMemory(np.ones((1, 16), np.float32), relevance_of(POSITIVES)[:1], ["a text"])

    for change in (lambda: model.remember(queries), other_settings, add, replace):
        model.calibrate(queries)
        caplog.clear()
        change()
        assert model.calibration is None
        assert caplog.text.count("call `calibrate` again") == 1


def test_failed_remember_keeps_the_calibration(model, queries):
    model.calibrate(queries)
    with pytest.raises(ValueError, match="label_ids"):
        model.remember(Dataset.from_dict({"text": ["boat"], "label_ids": [[99]]}))
    assert model.calibration is not None


def test_other_changes_keep_the_calibration_and_are_reported_once(model, queries, caplog):
    model.calibrate(queries)
    caplog.clear()
    model.index = FaissIndex(model.index.embeddings)  # scores mean the same
    model.long_text = "mean"  # a static encoder reads everything
    model.predict("boat")
    assert not caplog.records
    model.add_labels(Dataset.from_dict({"text": ["old boat"], "seen": [True]}))  # it shares the votes
    for _ in range(2):
        assert 0 <= model.predict("boat")[0].score <= 1
    assert caplog.text.count("The labels are not those of the calibration") == 1


def test_change_of_long_text_is_reported_if_texts_can_be_too_long(bert_folder, queries, caplog):
    model = XMCModel(make_bert_encoder(bert_folder), LABELS)
    model.calibrate(queries)
    model.long_text = "max"
    for _ in range(2):
        model.predict("boat")
    assert caplog.text.count("long_text is 'max' and was 'truncate'") == 1
