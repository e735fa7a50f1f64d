"""Probabilities hold on other queries, and thresholds reach the precision they were chosen for."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from helpers.tampering import forge
from helpers.tiny import LABELS, POSITIVES, relevance_of

from hf_xmc import Hierarchy, TopK, XMCModel
from hf_xmc.metrics.calibration import (
    Calibration,
    choose_threshold,
    expected_calibration_error,
    scores_and_hits,
    threshold_for_count,
    threshold_for_f1,
    threshold_for_precision,
)


def predictions(seed, num_queries=3000, k=5):
    """Scores whose probability is known: the logistic function of twice the score."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.normal(size=(num_queries, k)), axis=1)
    label_ids = np.tile(np.arange(k), (num_queries, 1))
    right = rng.random((num_queries, k)) < 1 / (1 + np.exp(-2 * scores))
    return TopK(label_ids, scores.astype(np.float32)), sp.csr_array(right.astype(float))


def test_probabilities_hold_on_other_queries():
    calibration = Calibration.fit(*predictions(0))
    scores, hits = scores_and_hits(*predictions(1))
    assert expected_calibration_error(calibration(scores), hits) < 0.02
    assert expected_calibration_error(1 / (1 + np.exp(-scores)), hits) > 0.05  # not calibrated
    np.testing.assert_allclose(calibration(np.array([-1.0, 0, 1])), 1 / (1 + np.exp([2.0, 0, -2])), atol=0.06)


def test_threshold_holds_its_precision_on_other_queries():
    threshold = threshold_for_precision(*scores_and_hits(*predictions(0)), 0.8)
    scores, hits = scores_and_hits(*predictions(1))
    assert hits[scores >= threshold].mean() == pytest.approx(0.8, abs=0.02)


def test_different_scores_get_different_probabilities():
    found, relevance = predictions(0)
    probabilities = Calibration.fit(found, relevance)(np.linspace(-1.5, 1.5, 500))
    assert (np.diff(probabilities) > 0).all()


def test_calibration_passes_through_the_means_of_its_levels():
    # Isotonic regression of hits 0 1 0 1 1 over scores 1 to 5 has the levels 0, 1/2 for scores 2 and 3, and 1.
    found = TopK(np.arange(5)[:, None], np.array([[1.0], [2], [3], [4], [5]], np.float32))
    calibration = Calibration.fit(found, sp.csr_array(np.diag([0, 1, 0, 1, 1])))
    assert calibration.scores == (1, 2.5, 4.5)
    assert calibration.probabilities == (0, 0.5, 1)


def test_thresholds_equal_hand_computed_values():
    scores, hits = np.array([0.9, 0.8, 0.8, 0.5, 0.4, 0.1]), np.array([1, 1, 0, 1, 0, 0])
    # At 0.9: 2 * 1 / (1 + 4); at 0.8: 2 * 2 / (3 + 4); at 0.5: 2 * 3 / (4 + 4); at 0.4: 2 * 3 / (5 + 4).
    assert threshold_for_f1(scores, hits, 4) == 0.5
    assert threshold_for_f1(scores[:3], hits[:3], 1) == 0.9
    assert threshold_for_precision(scores, hits, 0.7) == 0.5
    # Two texts: one label each is the first two, but 0.8 stands twice and would make three.
    assert threshold_for_count(scores, 2, 1) == 0.9
    assert threshold_for_count(scores, 2, 1.5) == 0.8
    assert threshold_for_count(scores, 2, 9) == 0.1
    with pytest.raises(ValueError, match="2 predictions share the highest score"):
        threshold_for_count(np.array([1.0, 1, 0]), 2, 0.5)
    found = TopK(np.array([[0, 1, 2], [0, 1, 2]]), scores.reshape(2, 3))
    relevance = sp.csr_array([[1, 1, 0, 1], [1, 0, 0, 0]])
    assert choose_threshold(found, relevance) == 0.5
    assert choose_threshold(found, relevance, precision=0.7) == 0.5
    assert choose_threshold(found, relevance, labels_per_text=1.5) == 0.8


def learned(encoder, queries):
    """Return a model that remembers queries of its own."""
    model = XMCModel(encoder, LABELS)
    model.remember(queries.select(range(8)).map(lambda row: {"text": f"plant {row['text']}"}))
    return model


def test_calibrated_model_predicts_probabilities_in_the_same_order(encoder, queries):
    model = learned(encoder, queries)
    before = model.predict(list(queries["text"]))
    model.calibrate(queries)
    after = model.predict(list(queries["text"]))
    found = model.search(list(queries["text"]), 5)
    scores, hits = scores_and_hits(found, relevance_of(POSITIVES))
    assert expected_calibration_error(model.calibration(scores), hits) < 0.1
    for old, new in zip(before, after, strict=True):
        assert [p.uid for p in old] == [p.uid for p in new]
        assert [p.score for p in new] == pytest.approx(model.calibration(np.array([p.score for p in old])).tolist())
        assert all(0 <= p.score <= 1 for p in new)


def test_predict_with_a_threshold_omits_less_probable_labels(encoder, queries):
    model, texts = learned(encoder, queries), list(queries["text"])
    with pytest.raises(ValueError, match="scores are not calibrated yet: call `calibrate`"):
        model.predict(texts, threshold=0.5)
    with pytest.raises(ValueError, match="scores are not calibrated yet: call `calibrate`"):
        model.threshold_for(queries)
    model.calibrate(queries)
    threshold = model.threshold_for(queries, precision=0.8)
    kept = model.predict(texts, threshold=threshold)
    every = model.predict(texts, 11)
    assert kept == [[p for p in labels if p.score >= threshold] for labels in every]
    assert 0 < sum(map(len, kept)) < sum(map(len, every))
    right = [int(p.uid) in POSITIVES[row] for row, labels in enumerate(kept) for p in labels]
    assert np.mean(right) >= 0.8
    few = model.predict(texts, threshold=model.threshold_for(queries, labels_per_text=1))
    assert 0 < sum(map(len, few)) <= len(texts)
    for wrong in (1.1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"`threshold` must be a probability from 0 to 1, got {wrong}"):
            model.predict_stream(["blue"], threshold=wrong)  # at the call, before a text is read
    for wrong, said in (
        ({"precision": 1.5}, "`precision` must be"),
        ({"labels_per_text": 0}, "`labels_per_text` must be"),
    ):
        with pytest.raises(ValueError, match=said):
            model.threshold_for(queries, **wrong)
    with pytest.raises(ValueError, match="`precision` and `labels_per_text` must not be given together"):
        model.threshold_for(queries, precision=0.8, labels_per_text=1)


def test_changes_of_the_scores_remove_the_calibration(encoder, queries, caplog):
    model = XMCModel(encoder, LABELS)
    for change in (model.remember, model.tune_memory):
        model.calibrate(queries)
        change(queries)
        assert model.calibration is None
        assert "call `calibrate` again" in caplog.text
        caplog.clear()
    model.calibrate(queries)
    model.add_labels(["horse"])
    with pytest.raises(ValueError, match="positive in at least one row, got none"):
        model.tune_memory(queries.select([POSITIVES.index([])]))
    assert model.calibration is not None
    model.memory = None
    assert model.calibration is None
    assert "call `calibrate` again" in caplog.text


def test_calibrate_refuses_missing_queries_with_a_hint(encoder, queries):
    model = learned(encoder, queries)
    for use in (model.remember, model.tune_memory, model.calibrate, model.threshold_for):
        with pytest.raises(ValueError, match=r"got NoneType. If there is no validation split, XMCData.carve_valid"):
            use(None)
        with pytest.raises(ValueError, match=r"there is no column label_ids, only text\."):
            use(queries.select_columns("text"))


def test_calibration_ignores_padding():
    found = TopK(np.array([[1, -1], [0, 1]]), np.array([[2.0, -np.inf], [3.0, 1.0]], np.float32))
    scores, hits = scores_and_hits(found, sp.csr_array([[0, 1], [0, 1]]))
    assert scores.tolist() == [2, 3, 1]
    assert hits.tolist() == [1, 0, 1]
    assert Calibration((0.0, 1.0), (0.2, 0.9))(np.array([-np.inf, -5, 0.5, 9])).tolist() == [0, 0.2, 0.55, 0.9]


def test_calibration_error_is_the_weighted_mean_gap_of_bins():
    # Two bins: mean 0.1 against 0.5 right, and 0.9 against all right.
    error = expected_calibration_error(np.array([0.1, 0.1, 0.9, 0.9]), np.array([1.0, 0, 1, 1]), bins=2)
    assert error == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)


def test_equal_scores_are_on_the_same_side_of_a_threshold():
    assert threshold_for_precision(np.array([0.9, 0.5, 0.5, 0.5]), np.array([1, 1, 0, 0]), 0.6) == 0.9


def test_calibration_is_saved_bit_for_bit(encoder, tmp_path):
    model = XMCModel(encoder, LABELS)
    model.calibration = Calibration.fit(*predictions(0))
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").calibration == model.calibration
    assert XMCModel.from_pretrained(tmp_path / "model", labels=["boat"]).calibration is None  # one of other labels
    model.calibration = None
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").calibration is None


@pytest.mark.parametrize(
    ("scores", "probabilities", "wrong"),
    [
        ([], [], "same length, at least 1, got 0 and 0"),
        ([1], [0.1, 0.2], "same length, at least 1, got 1 and 2"),
        ([[1, 2]], [[0.1, 0.2]], "same length, at least 1, got 1 and 1"),
        ([1, 1], [0.1, 0.2], "`scores` of a calibration must be finite and increasing"),
        ([1, float("inf")], [0.1, 0.2], "`scores` of a calibration must be finite and increasing"),
        ([float("nan")], [0.1], "`scores` of a calibration must be finite and increasing"),
        ([1, 2], [0.2, 0.1], "between 0 and 1 and must not decrease"),
        ([1, 2], [0.2, 1.5], "between 0 and 1 and must not decrease"),
        ([1, 2], [-0.2, 1], "between 0 and 1 and must not decrease"),
        ([1], [float("nan")], "between 0 and 1 and must not decrease"),
        (["a"], [0.1], "could not convert string"),
        ({"a": 1}, [0.1], "float"),
    ],
)
def test_calibration_refuses_points_that_are_no_rising_map(scores, probabilities, wrong, encoder, tmp_path):
    model = XMCModel(encoder, LABELS)
    model.calibration = Calibration((0.0,), (0.5,))
    model.save_pretrained(tmp_path / "model")
    forged = json.dumps({"scores": scores, "probabilities": probabilities}).encode()
    forge(tmp_path / "model", {"calibration.json": forged})
    with pytest.raises(ValueError, match=f"calibration.json does not hold a calibration as it was saved .*{wrong}"):
        XMCModel.from_pretrained(tmp_path / "model")


def test_invalid_input_is_named_in_the_error():
    with pytest.raises(
        ValueError, match=r"no threshold reaches a precision of 0.9. The best on these queries is 0.500"
    ):
        threshold_for_precision(np.array([0.5, 0.5]), np.array([1, 0]), 0.9)
    with pytest.raises(ValueError, match="calibration needs at least one prediction"):
        Calibration.fit(TopK(np.full((1, 1), -1), np.full((1, 1), -np.inf)), sp.csr_array((1, 3)))


def test_other_calibration_methods_equal_their_definitions(script):
    ways = script("calibration")
    # Label 0 is always right and label 1 never, at the same scores: one map cannot tell.
    found = TopK(np.array([[0, 1], [0, 1], [0, 2]]), np.array([[2.0, 2.0], [1.0, 1.0], [0.5, 0.4]], np.float32))
    relevance = sp.csr_array(np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0]]))
    test = TopK(np.array([[0, 1, 2]]), np.array([[1.0, 2.0, -1.0]], np.float32))
    assert ways.maps_of_frequent_labels(found, relevance, test, floor=4).tolist() == [
        Calibration.fit(found, relevance)(test.scores)[0].tolist()
    ]
    assert ways.maps_of_frequent_labels(found, relevance, test, floor=2)[0, :2].tolist() == [1.0, 0.0]
    plain = ways.plain_isotonic(found, relevance, test)[0]
    assert plain[2] == 0  # below all that was fitted on
    assert plain[0] == plain[1] == pytest.approx(3 / 5)  # of 0.5, 1, 1, 2, 2, as a rising map has it


def test_labels_after_the_first_five_have_their_own_map(encoder, tmp_path):
    # First labels: right at score 2, wrong at 1. Second labels: one in two right at score 2, none at 0.
    found = TopK(np.array([[0, 1], [0, 1], [0, 1], [0, 1]]), np.array([[2, 2], [2, 2], [1, 0], [1, 0]], np.float32))
    relevance = sp.csr_array([[1, 1], [1, 0], [0, 0], [0, 0]])
    calibration = Calibration.fit(found, relevance, first=1)
    assert (calibration.scores, calibration.probabilities) == ((1, 2), (0, 1))
    assert (calibration.deeper.scores, calibration.deeper.probabilities) == ((0, 2), (0, 0.5))
    # Below, at score 1, the map of the second would say 1/4, and the first label has 0.
    assert calibration(np.array([[2, 2], [1.5, 1], [1, 1]])).tolist() == [[1, 0.5], [0.5, 0], [0, 0]]
    assert calibration(np.array([2, 1])).tolist() == [1, 0]
    assert calibration.error(found, relevance, 1) == calibration.error(found, relevance, 2) == 0
    assert Calibration.fit(found, relevance, first=2).deeper is None
    model = XMCModel(encoder, LABELS)
    model.calibration = calibration
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").calibration == calibration
    for first, deeper in ((None, calibration), (0, calibration), (1.5, calibration), (1, None)):
        with pytest.raises(ValueError, match="`first` must be an integer of at least 1 and requires `deeper`"):
            Calibration((1.0,), (0.5,), first, deeper)


@pytest.mark.parametrize("remembers", [False, True])
def test_threshold_returns_all_labels_that_reach_it(encoder, queries, remembers):
    model = learned(encoder, queries) if remembers else XMCModel(encoder, LABELS)
    model.calibrate(queries)
    texts = list(queries["text"])
    every = model.predict(texts, 11)
    for threshold in (0, 0.01, 0.2, 1):
        expected = [[p for p in labels if p.score >= threshold] for labels in every]
        assert model.predict(texts, threshold=threshold) == expected
        assert list(model.predict_stream(texts, threshold=threshold)) == expected
        assert model.predict(texts, 2, threshold=threshold) == [labels[:2] for labels in expected]
    assert max(map(len, model.predict(texts, threshold=0))) == 11
    assert {len(labels) for labels in model.predict(texts)} == {5}
    for wanted in (0.5, 0.8):
        chosen = model.predict(texts, threshold=model.threshold_for(queries, precision=wanted))
        right = [int(p.uid) in POSITIVES[row] for row, labels in enumerate(chosen) for p in labels]
        assert np.mean(right) >= wanted
    few = model.predict(texts, threshold=model.threshold_for(queries, labels_per_text=3))
    assert 0 < sum(map(len, few)) <= 3 * len(texts)


def test_threshold_equal_to_a_probability_is_reached_with_a_hierarchy(encoder):
    model = XMCModel(encoder, LABELS)
    model.calibration = Calibration((-1e3, -1e2), (0.0, 0.7))  # float32 would round 0.7 down
    for hierarchy in (None, Hierarchy({"0": ["4"]})):
        labels = model.predict("a red boat", threshold=0.7, hierarchy=hierarchy)
        assert [label.score for label in labels] == [0.7] * 11


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "3", True])
def test_invalid_top_k_is_refused_before_a_text_is_read(wrong, encoder, queries, monkeypatch):
    model = XMCModel(encoder, LABELS)
    model.calibrate(queries, np.int64(3))
    assert model.calibration.first == 3
    monkeypatch.setattr(model, "_embed", lambda texts: pytest.fail("a text was read"))
    for call in (
        lambda: model.predict_stream(["boat"], wrong),
        lambda: model.predict("boat", wrong, threshold=0.5),
        lambda: model.calibrate(queries, wrong),
        lambda: model.threshold_for(queries, wrong),
    ):
        with pytest.raises(ValueError, match=f"top_k must be .*, got {wrong!r}"):
            call()
    for wanted in ({"precision": 0}, {"precision": float("nan")}, {"labels_per_text": -1}):
        with pytest.raises(ValueError, match="must be"):
            model.threshold_for(queries, **wanted)
    with pytest.raises(ValueError, match="must be a probability from 0 to 1, got '0'"):
        model.predict("boat", threshold="0")


def test_texts_that_reach_the_maximum_of_labels_are_reported(encoder, caplog):
    model = XMCModel(encoder, [f"boat {number}" for number in range(201)])
    model.calibration = Calibration((0.0,), (0.5,))
    assert len(model.predict("boat", threshold=0.5)) == 200
    assert "1 of 1 texts have 200 labels above the threshold and may have more: give top_k" in caplog.text
    caplog.clear()
    assert len(model.predict("boat", 201, threshold=0.5)) == 201
    model.remove_labels(["0"])
    assert len(model.predict("boat", threshold=0.5)) == 200
    assert not caplog.records
