"""A search among new labels, worked out by hand."""

import numpy as np
import pytest
import torch

from hf_xmc.search import new_labels
from hf_xmc.search.lexical import WordCounts
from hf_xmc.search.new_labels import NewLabelSearch

QUERIES = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
TEXTS = ["boat", "tree", "boat"]


@pytest.fixture
def search():
    embeddings = torch.tensor([[5.0, 0.0], [0.0, 0.5], [3.0, 4.0], [0.0, 0.0]])  # labels 3, 3, 6 and 8
    texts = ["car", "ship", "boat", "tree"]
    return NewLabelSearch(np.array([3, 6, 8]), np.array([0, 0, 1, 2]), embeddings, texts, WordCounts.of([]))


def test_scores_are_cosines_plus_shared_words(search):
    found = search.search(TEXTS, QUERIES, 4)
    assert found.label_ids.tolist() == [[6, 3, 8, -1], [3, 8, 6, -1], [-1] * 4]
    np.testing.assert_allclose(found.scores[0], [1.6, 1, 0, -np.inf], rtol=1e-6)
    np.testing.assert_allclose(found.scores[1], [1, 1, 0.8, -np.inf], rtol=1e-6)  # the better text of label 3


def test_choice_of_labels(search):
    assert search.search(TEXTS, QUERIES, 2, allow=np.array([0, 3, 8])).label_ids[0].tolist() == [3, 8]
    assert search.search(TEXTS, QUERIES, 1, exclude=np.array([[0, 6], [1, 0]])).label_ids[:2].tolist() == [[3], [3]]


def test_blocks_of_any_size_agree(search, monkeypatch):
    whole = search.search(TEXTS, QUERIES, 2, exclude=np.array([[1, 3]]))
    monkeypatch.setattr(new_labels, "CELLS", 4)
    for one, other in zip(whole, search.search(TEXTS, QUERIES, 2, exclude=np.array([[1, 3]])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_equal_scores_are_in_the_order_of_ids():
    same = NewLabelSearch(np.array([2, 5, 7]), np.arange(3), torch.ones(3, 2), ["car"] * 3, WordCounts.of([]))
    assert same.search(["tree"], torch.ones(1, 2), 2).label_ids.tolist() == [[2, 5]]
