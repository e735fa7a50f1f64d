"""Places of new labels, worked out by hand."""

import numpy as np
import pytest

from hf_xmc import TopK
from hf_xmc.search.places import handicaps, with_new_labels

SEEN = TopK(np.array([[0, 1, 2, 3]]), np.array([[0.9, 0.6, 0.4, 0.3]]))
NEW = TopK(np.array([[7, 8, 9]]), np.array([[0.6, 0.1, 0.01]]))


def merged(seen, new, needed):
    best = with_new_labels(seen, new, np.array(needed))
    return best.label_ids.tolist(), best.scores.tolist()


def test_the_last_two_of_each_ten_places_are_reserved_by_default():
    needed = handicaps(25)
    assert np.flatnonzero(needed < 1).tolist() == [8, 9, 18, 19]
    assert (needed[[8, 9, 18, 19]] > 0).all()  # not for improbable labels
    assert (handicaps(5) == 1).all()


@pytest.mark.parametrize("k", [5, 9, 10, 12])
def test_fewer_labels_are_the_beginning_of_more(k):
    np.testing.assert_array_equal(handicaps(30)[:k], handicaps(k))


def test_given_places_are_reserved_outright_at_the_end():
    assert handicaps(5, 2).tolist() == [1, 1, 1, 0, 0]
    assert (handicaps(5, 0) == 1).all()


def test_labels_compete_by_probability_and_ties_go_to_the_seen_one():
    assert merged(SEEN, NEW, [1] * 4) == ([[0, 1, 7, 2]], [[0.9, 0.6, 0.6, 0.4]])


def test_reserved_places_take_the_next_new_label():
    assert merged(SEEN, NEW, [1, 1, 1, 0]) == ([[0, 1, 7, 8]], [[0.9, 0.6, 0.6, 0.1]])
    assert merged(SEEN, NEW, [1, 0.9, 0, 0.2])[0] == [[0, 7, 8, 1]]  # 9 is too improbable


def test_a_kind_that_runs_out_leaves_its_places_to_the_other():
    none = TopK.empty(1, 2)
    assert merged(SEEN, none, [1, 0, 0]) == ([[0, 1, 2]], [[0.9, 0.6, 0.4]])
    assert merged(none, NEW, [1] * 4) == ([[7, 8, 9, -1]], [[0.6, 0.1, 0.01, -np.inf]])
    one = TopK(np.array([[0, -1]]), np.array([[0.2, 0.0]]))  # padding may have any score
    assert merged(one, TopK(np.array([[-1]]), np.array([[0.0]])), [0, 0]) == ([[0, -1]], [[0.2, -np.inf]])
