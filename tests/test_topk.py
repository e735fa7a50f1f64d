"""Recall of one ranking against another."""

import numpy as np
import pytest

from hf_xmc.topk import TopK, recall_of


def test_recall_counts_equal_scores_as_found():
    exact = TopK(np.array([[4, 2, -1], [0, 1, 2]]), np.array([[3.0, 2.0, -np.inf], [1.0, 1.0, 1.0]]))
    found = TopK(np.array([[4, 7, 5], [8, 9, 3]]), np.array([[3.0, 1.9, 1.0], [1.0, 1.0, 0.9]]))
    assert recall_of(found, exact) == pytest.approx(3 / 5)  # of 2 and 3, 1 and 2
    assert recall_of(exact, exact) == 1
    nothing = TopK(np.full((2, 3), -1), np.full((2, 3), -np.inf))
    assert recall_of(nothing, exact) == 0
    assert recall_of(nothing, nothing) == 1
