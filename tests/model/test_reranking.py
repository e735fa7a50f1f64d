"""Labels that are reranked come in the order of the new scores, which are calibrated like any others."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification

from hf_xmc import Candidate, Hierarchy, XMCModel

TEXT = "an old red boat"
NAMED = Dataset.from_dict({"uid": [f"L{row}" for row in range(11)], "text": LABELS})


@pytest.fixture
def model(encoder):
    return XMCModel(encoder, NAMED)


def by_length(text, candidates):
    """Stand in for a language model: short labels first."""
    return [10.0 - len(candidate.text) for candidate in candidates]


def cross_encoder(folder, path, num_labels=1):
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(folder, num_labels=num_labels, initializer_range=0.3)
    BertForSequenceClassification(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    return CrossEncoder(str(path), device="cpu")


def test_the_function_sees_the_best_labels_and_its_scores_rank_them(model):
    seen = []

    def rerank(text, candidates):
        seen.append((text, list(candidates)))
        candidates.clear()  # the list is the function's own
        return [0.5, 2.0, 1.0, 0.5]

    first = model.predict(TEXT, 4)
    found = model.predict(TEXT, 3, rerank=rerank, rerank_top_k=4)
    assert [text for text, _ in seen] == [TEXT]
    assert [tuple(candidate) for candidate in seen[0][1]] == [tuple(label) for label in first]
    assert isinstance(seen[0][1][0], Candidate)
    assert [label.uid for label in found] == [first[1].uid, first[2].uid, first[0].uid]  # of equal scores, the better
    assert [label.score for label in found] == [2.0, 1.0, 0.5]


def test_a_label_behind_rerank_top_k_does_not_come_back(model):
    best = {label.uid for label in model.predict(TEXT, 3)}
    found = model.predict([TEXT, "", "zzz"], rerank=by_length, rerank_top_k=3)
    assert [len(labels) for labels in found] == [3, 0, 0]
    assert {label.uid for label in found[0]} == best
    with pytest.raises(ValueError, match=r"`top_k` must be at most `rerank_top_k`.*got 5 and 3"):
        model.predict(TEXT, 5, rerank=by_length, rerank_top_k=3)
    assert len(model.predict(TEXT, 100, rerank=by_length)) == 11  # all of them


def test_allow_and_hierarchy_work_with_a_reranker(model):
    (only,) = model.predict(TEXT, rerank=by_length, allow=["L10"])
    assert (only.uid, only.score) == ("L10", 10.0 - len("old oak tree"))
    tree = Hierarchy({"L7": ["L6"]})  # red is a colour
    risen = {label.uid: label.score for label in model.predict(TEXT, 11, rerank=by_length, hierarchy=tree)}
    assert risen["L6"] == risen["L7"] == 10.0 - len("red")


def test_a_cross_encoder_scores_pairs_of_text_and_label(model, bert_folder, tmp_path):
    reranker = cross_encoder(bert_folder, tmp_path)
    found = model.predict([TEXT, "", "blue car"], 11, rerank=reranker)
    for text, labels in ((TEXT, found[0]), ("blue car", found[2])):
        expected = reranker.predict([(text, label) for label in LABELS])
        assert [label.text for label in labels] == [LABELS[row] for row in np.argsort(-expected, kind="stable")]
        assert [label.score for label in labels] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    assert found[1] == []
    assert found[0] != found[2]


def test_a_stream_with_a_reranker_answers_before_it_has_read_a_thousand_texts(model):
    asked = []

    def rerank(text, candidates):
        asked.append(text)
        return by_length(text, candidates)

    stream = model.predict_stream([f"{number} boat" for number in range(1000)], rerank=rerank)
    next(stream)
    assert len(asked) == 16


def test_calibration_fits_the_scores_of_the_reranker(model, queries):
    model.calibrate(queries, rerank=right_answers, rerank_top_k=11)
    choice = {"rerank": right_answers, "rerank_top_k": 11}
    for text, ids in zip(queries["text"], POSITIVES, strict=True):
        found = model.predict(text, threshold=0.5, **choice)
        assert {int(label.uid[1:]) for label in found} == set(ids)
        assert all(label.score == 1 for label in found)
    threshold = model.threshold_for(queries, precision=1.0, **choice)
    assert 0 < threshold <= 1
    with pytest.raises(ValueError, match="calibrated for scores with rerank=right_answers, rerank_top_k=11"):
        model.threshold_for(queries)


def right_answers(text, candidates):
    ids = POSITIVES[int(text.split()[1])]
    return [float(int(candidate.uid[1:]) in ids) for candidate in candidates]


@pytest.mark.parametrize("other", [{}, {"rerank": by_length}, {"rerank": right_answers, "rerank_top_k": 4}])
def test_scores_of_another_reranker_are_not_read_as_probabilities(model, queries, other):
    model.calibrate(queries, rerank=right_answers)
    with pytest.raises(
        ValueError, match="calibrated for scores with rerank=right_answers, rerank_top_k=50, got rerank="
    ):
        model.predict(queries["text"][0], **other)
    assert model.predict(queries["text"][0], rerank=right_answers)
    model.calibration = None
    assert model.predict(queries["text"][0], **other)


def test_a_calibration_without_a_reranker_is_not_for_one(model, queries):
    model.calibrate(queries)
    with pytest.raises(ValueError, match="scores with rerank=None, got rerank=by_length, rerank_top_k=50"):
        model.predict(TEXT, rerank=by_length)
    model.calibrate(queries, rerank=by_length)
    model.calibrate(queries)  # the last one counts
    assert 0 <= model.predict(TEXT)[0].score <= 1


def test_an_explanation_is_of_the_score_before_reranking(model, queries):
    (before,) = model.predict(TEXT, 1)
    model.calibrate(queries, rerank=by_length)
    assert model.explain(TEXT, before.uid).score == pytest.approx(before.score, rel=1e-5)


def test_a_saved_model_leaves_a_reranked_calibration_out_and_says_so(model, queries, tmp_path, caplog):
    model.calibrate(queries, rerank=by_length)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "model")
    assert "rerank=by_length, rerank_top_k=50" in caplog.text
    assert "the calibration is left out" in caplog.text
    assert XMCModel.from_pretrained(tmp_path / "model").calibration is None
    assert model.calibration is not None


def test_more_labels_than_are_reranked_may_reach_a_threshold_and_the_warning_says_which_argument(
    model, queries, caplog
):
    model.calibrate(queries, rerank=right_answers, rerank_top_k=2)
    with caplog.at_level(logging.WARNING):
        model.predict(queries["text"][0], threshold=0.0, rerank=right_answers, rerank_top_k=2)
    assert "give a larger rerank_top_k" in caplog.text


@pytest.mark.parametrize(
    ("scores", "got"),
    [([1.0], r"\[1.0\]"), ([float("nan")] * 11, "nan"), (["a"] * 11, "'a'"), (None, "None"), ([[1.0]] * 11, "1.0")],
)
def test_scores_that_are_no_finite_number_for_each_label_are_refused(model, scores, got):
    with pytest.raises(ValueError, match=rf"`rerank` must return a finite number for each of 11 .*{got}"):
        model.predict(TEXT, rerank=lambda text, candidates: scores)


def test_wrong_arguments_are_refused_at_the_call(model, bert_folder, tmp_path):
    for call in (model.predict_stream, lambda texts, **given: model.calibrate(Dataset.from_dict({}), **given)):
        with pytest.raises(ValueError, match=r"`rerank` must be a function .* got str"):
            call([TEXT], rerank="a-model")
        with pytest.raises(ValueError, match="rerank_top_k must be at least 1, got 0"):
            call([TEXT], rerank=by_length, rerank_top_k=0)
        with pytest.raises(ValueError, match="`rerank_top_k` has an effect with `rerank` only"):
            call([TEXT], rerank_top_k=3)
        with pytest.raises(ValueError, match="gives 3"):
            call([TEXT], rerank=cross_encoder(bert_folder, tmp_path, num_labels=3))
