"""The votes of training queries follow the formula, and can be mixed, tuned, extended and saved."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from datasets import Dataset
from helpers.tiny import LABELS

from hf_xmc import LabelIndex, MemorySettings, TrainingMemory, XMCModel
from hf_xmc.metrics.frequency import inverse_propensity, label_counts
from hf_xmc.metrics.ranking import evaluate_ranking, precision_at_k
from hf_xmc.search.memory_settings import GRID

SETTINGS = MemorySettings(neighbors=3, temperature=0.2, label_temperature=2, mix=0.3, discount=0.1, first_discount=-0.2)


def random_problem(seed=0, num_labels=7, num_known=13):
    rng = np.random.default_rng(seed)
    queries, known, labels = (rng.normal(size=(n, 5)).astype(np.float32) for n in (4, num_known, num_labels))
    return queries, known, labels, sp.random_array((num_known, num_labels), density=0.3, rng=rng, format="csr")


def formula(queries, known, labels, relevance, settings, hidden=()):
    """The mixed score of every label, written out densely; labels left out are not in the softmax."""
    own = np.exp(queries @ labels.T / settings.label_temperature)
    for row, label in hidden:
        own[row, label] = 0
    own /= own.sum(1, keepdims=True)
    unit = [table / np.linalg.norm(table, axis=1, keepdims=True) for table in (queries, known)]
    cosines = unit[0] @ unit[1].T
    cosines[cosines < np.sort(cosines, axis=1)[:, [-settings.neighbors]]] = -np.inf
    weights = np.exp(cosines / settings.temperature)
    weights /= weights.sum(1, keepdims=True)
    positives = (relevance.toarray() > 0).astype(float)
    mixed = (1 - settings.mix) * own + settings.mix * weights @ positives
    for row, label in hidden:
        mixed[row, label] = 0
    mixed[mixed == 0] = 1e-300
    frequency = np.log1p(positives.sum(0))
    scores, firsts = np.log(mixed) - settings.discount * frequency, np.log(mixed) - settings.first_discount * frequency
    first = firsts.argmax(1)[:, None]
    np.put_along_axis(scores, first, np.take_along_axis(firsts, first, 1), 1)
    return scores


def test_mixed_score_equals_the_formula():
    queries, known, labels, relevance = random_problem()
    memory = TrainingMemory(known, relevance, settings=SETTINGS)
    found = memory.search(queries, 7, LabelIndex(labels))
    scores = formula(queries, known, labels, relevance, SETTINGS)
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(found.label_ids, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), rtol=1e-4)


def test_two_equal_neighbours_give_each_of_their_labels_half_a_vote():
    memory = TrainingMemory(
        np.array([[1, 1], [1, -1], [-1, 0]], np.float32),
        sp.csr_array([[1, 1, 0], [0, 1, 0], [0, 0, 1]]),
        settings=MemorySettings(neighbors=2, mix=1, first_discount=0),
    )
    found = memory.search(np.array([[3.0, 0.0]]), 3, LabelIndex(np.eye(3, 2, dtype=np.float32)))
    assert found.label_ids.tolist() == [[1, 0, -1]]
    assert np.exp(found.scores[0]).tolist() == pytest.approx([1, 0.5, 0])


def test_hidden_labels_take_no_part_in_the_votes():
    queries, known, labels, relevance = random_problem()
    memory, index = TrainingMemory(known, relevance, settings=SETTINGS), LabelIndex(labels)

    def check(found, hidden):
        scores = formula(queries, known, labels, relevance, SETTINGS, hidden)
        for row, label in hidden:
            scores[row, label] = -np.inf
        order = np.argsort(-scores, axis=1)
        expected = np.where(np.isneginf(np.take_along_axis(scores, order, 1)), -1, order)
        np.testing.assert_array_equal(found.label_ids, expected)

    pairs = np.array([[0, 3], [0, 4], [2, 1], [3, 6]])
    check(memory.search(queries, 7, index, exclude=pairs), pairs)
    check(memory.search(queries, 7, index, deny=[2]), [(row, 2) for row in range(4)])
    others = [(row, label) for row in range(4) for label in range(7) if label not in (1, 5)]
    check(memory.search(queries, 7, index, allow=(n for n in [1, 5])), others)


def test_k_does_not_change_the_scores(monkeypatch):
    monkeypatch.setattr("hf_xmc.search.memory.QUERY_BLOCK", 3)
    queries, known, labels, relevance = random_problem()
    memory, index = TrainingMemory(known, relevance, settings=replace(SETTINGS, candidates=3)), LabelIndex(labels)
    few, all_of_them = memory.search(queries, 2, index), memory.search(queries, 7, index)
    np.testing.assert_array_equal(few.label_ids, all_of_them.label_ids[:, :2])
    np.testing.assert_array_equal(few.scores, all_of_them.scores[:, :2])


def test_added_queries_vote_like_the_first_ones():
    queries, known, labels, relevance = random_problem()
    whole = TrainingMemory(known, relevance, list("abcdefghijklm"), settings=SETTINGS)
    grown = TrainingMemory(known[:6], relevance[:6], list("abcdef"), settings=SETTINGS)
    grown.add(known[6:], relevance[6:], list("ghijklm"))
    one, other = (memory.search(queries, 7, LabelIndex(labels)) for memory in (whole, grown))
    np.testing.assert_array_equal(one.label_ids, other.label_ids)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert grown.texts == whole.texts
    assert len(grown) == 13


def test_query_without_a_known_word_is_ranked_by_label_scores():
    _, known, labels, relevance = random_problem()
    found = TrainingMemory(known, relevance, settings=MemorySettings(mix=0.5, first_discount=0)).search(
        np.zeros((1, 5)), 7, LabelIndex(labels)
    )
    np.testing.assert_allclose(np.exp(found.scores), 0.5 / 7, rtol=1e-5)


@pytest.mark.parametrize("useful", ["votes", "labels"])
def test_tune_finds_the_useful_part(useful):
    rng = np.random.default_rng(0)
    queries, labels, elsewhere = (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 30, 60))
    truth = np.argsort(-(queries @ labels.T if useful == "labels" else rng.random((60, 30))), axis=1)[:, :5]
    relevance = sp.csr_array((np.ones(300), truth.ravel(), np.arange(0, 301, 5)), shape=(60, 30))
    memory = TrainingMemory(queries if useful == "votes" else elsewhere, relevance)
    memory.settings = MemorySettings(mix=0.03 if useful == "votes" else 0.9)  # the wrong one
    tuned = memory.tune(queries, relevance, LabelIndex(labels))
    reached = memory.search(queries, 5, LabelIndex(labels)).label_ids
    assert precision_at_k(reached, relevance, 5) == tuned["validation"]["P@5"] > 0.9
    assert memory.settings.mix == tuned["mix"]


@pytest.mark.parametrize("safe", ["frequent", "rare"])
def test_tune_finds_the_discount_of_the_first_label(safe):
    """All neighbors agree on a label of their cluster, and on one that all queries in the memory have."""
    queries = np.eye(12, dtype=np.float32).repeat(3, 0)
    own, shared = np.arange(12).repeat(3), np.full(36, 12)  # the label with the smaller number, its own, wins a tie
    one_hot = np.eye(13, dtype=np.float32)
    memory, index = (
        TrainingMemory(queries, sp.csr_array(one_hot[own] + one_hot[shared])),
        LabelIndex(np.zeros((13, 12), np.float32)),
    )
    truth = shared if safe == "frequent" else own
    tuned = memory.tune(queries, sp.csr_array(one_hot[truth]), index)
    assert tuned["validation"]["P@1"] == 1
    assert memory.settings.first_discount == tuned["first_discount"] <= tuned["discount"]
    assert (tuned["first_discount"] < 0) == (safe == "frequent")
    found = memory.search(queries, 2, index)
    np.testing.assert_array_equal(found.label_ids[:, 0], truth)
    assert (np.diff(found.scores) <= 0).all()


def test_tuning_on_few_queries_never_puts_a_rare_label_first_because_it_is_rare():
    """Three queries are right with any discount of the first label, but more queries would not be."""
    queries, labels = np.eye(4, dtype=np.float32), np.zeros((5, 4), np.float32)
    relevance = sp.csr_array(np.hstack([np.ones((4, 1)), np.eye(4)]))  # the first label is that of all queries
    memory, given = TrainingMemory(queries, relevance), {"inverse_propensity": [1, 9, 9, 9, 9]}
    memory.tune(queries[:3], relevance[:3], LabelIndex(labels), metric="PSP@1", tolerance=1.0, **given)
    assert memory.settings.first_discount <= 0 <= memory.settings.discount


@pytest.mark.parametrize("metric", ["nDCG@5", "P@5"])
def test_tolerance_raises_the_metric_of_rare_labels(metric):
    rng = np.random.default_rng(0)
    queries, labels = rng.normal(size=(400, 6)).astype(np.float32), rng.normal(size=(30, 6)).astype(np.float32)
    share = np.linspace(0.02, 0.6, 30)
    relevance = sp.csr_array((rng.random((400, 30)) < share * (queries @ labels.T > 0)).astype(float))
    given = {"metric": metric, "inverse_propensity": 1 / share}
    reached = [
        TrainingMemory(queries[:300], relevance[:300]).tune(
            queries[300:], relevance[300:], LabelIndex(labels), tolerance=tolerance, **given
        )["validation"]
        for tolerance in (0, 0.5)  # a tenth of it, for 100 queries
    ]
    assert reached[1]["PSP@5"] > reached[0]["PSP@5"]
    assert all(reached[1][name] >= reached[0][name] - 0.05 for name in (metric, "P@1"))


def test_tolerance_is_spent_on_the_best_combination_of_all_settings():
    rng = np.random.default_rng(0)
    queries, labels = rng.normal(size=(1300, 6)).astype(np.float32), rng.normal(size=(30, 6)).astype(np.float32)
    share = np.linspace(0.02, 0.6, 30)
    relevance = sp.csr_array((rng.random((1300, 30)) < share * (queries @ labels.T > 0)).astype(float))
    memory, index = TrainingMemory(queries[:300], relevance[:300]), LabelIndex(labels)
    given = {"relevance": relevance[300:], "inverse_propensity": 1 / share}
    best = memory.tune(queries[300:], labels=index, **given)["validation"]
    tuned = memory.tune(queries[300:], labels=index, tolerance=0.05, **given)

    def measured(**changed):
        memory.settings = replace(settings, **changed)
        found = memory.search(queries[300:], 10, index).label_ids
        return evaluate_ranking(found, given["relevance"], inverse_propensity=1 / share, ndcg_at=[5], recall_at=[10])

    settings = memory.settings
    others = [measured(mix=mix, discount=value) for mix in GRID["mix"] for value in GRID["discount"]]
    others += [measured(neighbors=n, temperature=value) for n in GRID["neighbors"] for value in GRID["temperature"]]
    enough = [row["PSP@5"] for row in others if all(row[name] >= best[name] - 0.05 for name in ("nDCG@5", "P@1"))]
    assert tuned["validation"]["PSP@5"] >= max(enough) - 1 / 1000 > best["PSP@5"]
    assert all(tuned["validation"][name] >= best[name] - 0.05 for name in ("nDCG@5", "P@1"))


def test_few_queries_spend_a_part_of_the_tolerance(monkeypatch):
    rng = np.random.default_rng(0)
    queries, labels = rng.normal(size=(500, 6)).astype(np.float32), rng.normal(size=(30, 6)).astype(np.float32)
    share = np.linspace(0.02, 0.6, 30)
    relevance = sp.csr_array((rng.random((500, 30)) < share * (queries @ labels.T > 0)).astype(float))
    index, given = LabelIndex(labels), {"relevance": relevance[300:], "inverse_propensity": 1 / share}

    def tuned(tolerance):
        memory = TrainingMemory(queries[:300], relevance[:300])
        return memory.tune(queries[300:], labels=index, tolerance=tolerance, **given)

    a_fifth = tuned(0.1)  # of 1,000 queries, 200 are a fifth
    monkeypatch.setattr("hf_xmc.search.memory.SURE", 1)
    assert a_fifth == tuned(0.02) != tuned(0.1)


def test_tuning_on_few_queries_changes_only_what_is_clearly_better():
    """Random labels: some setting is always the best of hundreds, by chance."""
    rng = np.random.default_rng(0)
    queries, labels = rng.normal(size=(420, 6)).astype(np.float32), rng.normal(size=(30, 6)).astype(np.float32)
    relevance = sp.csr_array((rng.random((420, 30)) < 0.1).astype(float))
    index, moved = LabelIndex(labels), 0
    for start in range(300, 420, 30):
        memory, asked = TrainingMemory(queries[:300], relevance[:300]), slice(start, start + 30)
        before = memory.settings
        reached = memory.tune(queries[asked], relevance[asked], index)["validation"]["nDCG@5"]
        chosen, memory.settings = memory.settings, before
        found = memory.search(queries[asked], 10, index).label_ids
        kept = evaluate_ranking(found, relevance[asked], p_at=[1], ndcg_at=[5], recall_at=[10])["nDCG@5"]
        moved += chosen != before
        assert chosen == before or reached > kept + 1 / 30
    assert moved < 4


def test_tune_takes_propensities_from_the_memory_unless_given():
    queries, known, labels, relevance = random_problem()
    counts = label_counts(relevance)

    def tuned(**given):
        return TrainingMemory(known, relevance).tune(queries, relevance[:4], LabelIndex(labels), **given)

    for wanted in ({"metric": "PSP@5"}, {"tolerance": 0.01}):
        assert tuned(**wanted) == tuned(**wanted, inverse_propensity=inverse_propensity(counts, 13))
    assert tuned(metric="PSP@5") != tuned(metric="PSP@5", inverse_propensity=inverse_propensity(counts, 13, a=0.5))


def test_unit_vectors_are_not_normalised_again():
    """Half precision rounds: made of unit length anew, rows that are saved and loaded would change."""
    known = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float16)
    memory = TrainingMemory(known, sp.csr_array((500, 3)))
    again = TrainingMemory(memory.index.embeddings, memory.relevance)
    assert torch.equal(again.index.embeddings, memory.index.embeddings)
    again.add(memory.index.embeddings, memory.relevance)
    assert torch.equal(again.index.embeddings[500:], memory.index.embeddings)


def test_memory_is_saved_and_loaded_with_the_model(encoder, queries, tmp_path):
    model = XMCModel(encoder, LABELS)
    alone = model.search(["text about a cat"], 3).label_ids[0].tolist()
    model.remember(queries.select(range(8)))
    model.remember(queries.select(range(8, 13)))
    model.memory.settings = MemorySettings(neighbors=1, mix=0.9)
    voted = model.search([queries[5]["text"]], 2)
    assert sorted(voted.label_ids[0].tolist()) == [6, 7]  # the labels of that very text
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model")
    assert again.memory.settings == model.memory.settings
    assert again.memory.texts == list(queries["text"])
    found = again.search([queries[5]["text"]], 2)
    np.testing.assert_array_equal(found.label_ids, voted.label_ids)
    np.testing.assert_allclose(found.scores, voted.scores, atol=1e-3)
    again.memory = None
    assert again.search(["text about a cat"], 3).label_ids[0].tolist() == alone


def test_invalid_input_is_named_in_the_error(encoder, queries):
    _, known, labels, relevance = random_problem()
    memory = TrainingMemory(known, relevance)
    with pytest.raises(ValueError, match="got 12 embeddings, 13 rows of relevance"):
        TrainingMemory(known[:12], relevance)
    with pytest.raises(ValueError, match="memory has 7 labels, without texts; got 7 labels, with texts"):
        memory.add(known, relevance, ["a"] * 13)
    with pytest.raises(ValueError, match="must have the 7 labels of the memory, got an index of 6"):
        memory.search(known, 3, LabelIndex(labels[:6]))
    with pytest.raises(ValueError, match="embedding of query 0 is not finite"):
        memory.search(np.full((1, 5), np.nan), 3, LabelIndex(labels))
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            memory.search(known, k, LabelIndex(labels))
    with pytest.raises(ValueError, match=r"`metric` must be one of P@1, .*, PSP@5, nDCG@5, R@10, got 'nDCG@3'"):
        memory.tune(known, relevance, LabelIndex(labels), metric="nDCG@3")
    with pytest.raises(ValueError, match="`mix` must be a number from 0 to 1, got 2"):
        MemorySettings(mix=2)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        MemorySettings(temperature=0)
    with pytest.raises(ValueError, match="`first_discount` must be a number, got nan"):
        MemorySettings(first_discount=float("nan"))
    with pytest.raises(ValueError, match="no memory to tune"):
        XMCModel(encoder, LABELS).tune_memory(queries)
    with pytest.raises(ValueError, match="row 0: label id 11, but there are only 11 labels"):
        XMCModel(encoder, LABELS).remember(Dataset.from_dict({"text": ["a"], "label_ids": [[11]]}))
