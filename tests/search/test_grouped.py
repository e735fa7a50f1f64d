"""A grouped index ranks labels by the best score of their texts."""

import numpy as np
import pytest

from hf_xmc import FaissIndex, LabelIndex
from hf_xmc.search.grouped import GroupedIndex

SIZES = [1, 3, 1, 2, 9, 1, 1, 2, 1, 1]
LABEL_OF = np.repeat(np.arange(10), SIZES)


def whole_numbers(*shape, seed=0):
    """Sums of small whole numbers are exact, so ties are ties."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


QUERIES, TEXTS = whole_numbers(7, 3), whole_numbers(22, 3, seed=1)


def reference(k, hidden=()):
    by_text = QUERIES @ TEXTS.T
    scores = np.stack([by_text[:, label == LABEL_OF].max(1) for label in range(10)], axis=1)
    for row, label in hidden:
        scores[row, label] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    return np.where(np.isneginf(best), -1, order), best


@pytest.mark.parametrize("build", [LabelIndex, lambda texts: FaissIndex(texts, "Flat")])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_label_scores_as_the_best_of_its_texts(build, k):
    found = GroupedIndex(build(TEXTS), LABEL_OF).search(QUERIES, k)
    label_ids, scores = reference(k)
    np.testing.assert_array_equal(found.label_ids, label_ids)
    np.testing.assert_array_equal(found.scores, scores)


def test_k_labels_are_found_however_many_texts_one_has():
    # The first label's 50 texts are all better than the others': with k texts asked for, one label would be found.
    texts = np.concatenate([np.full((50, 1), 9), [[2], [3]]]).astype(np.float32)
    index = GroupedIndex(LabelIndex(texts), np.repeat([0, 1, 2], [50, 1, 1]))
    found = index.search(np.array([[1.0], [-1.0]]), 3)
    assert found.label_ids.tolist() == [[0, 2, 1], [1, 2, 0]]
    assert index.search(np.ones((1, 1)), 5).label_ids.tolist() == [[0, 2, 1, -1, -1]]


def test_excluded_label_is_omitted_with_all_its_texts():
    index = GroupedIndex(LabelIndex(TEXTS), LABEL_OF)
    pairs = np.array([[0, 4], [0, 1], [3, 9], [6, 4]])
    found = index.search(QUERIES, 10, exclude=pairs)
    label_ids, scores = reference(10, pairs)
    np.testing.assert_array_equal(found.label_ids, label_ids)
    np.testing.assert_array_equal(found.scores, scores)
    found = index.search(QUERIES, 4, allow=[4, 7, 1], deny=[1])
    assert np.sort(found.label_ids[:, :2]).tolist() == [[4, 7]] * 7
    assert (found.label_ids[:, 2:] == -1).all()


def test_invalid_input_is_named_in_the_error():
    index = GroupedIndex(LabelIndex(TEXTS), LABEL_OF)
    with pytest.raises(ValueError, match="label ids must be from 0 to 9, got 10"):
        index.search(QUERIES, 3, deny=[10])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match="`exclude` has query 0 and label 10, but there are 7 queries and 10 labels"):
        index.search(QUERIES, 3, exclude=np.array([[0, 10]]))
