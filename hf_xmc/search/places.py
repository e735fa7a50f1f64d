"""Places of new labels among the best labels of a query."""

from __future__ import annotations

import numpy as np

from hf_xmc.topk import TopK

PERIOD, RESERVED = 10, 2  # of each ten places, the last two are reserved for new labels
ENOUGH = 0.1  # for a reserved place, a new label needs this fraction of the probability of the seen label there


def handicaps(k: int, reserved: int | None = None) -> np.ndarray:
    """Return ``(k,)``, the fraction of a seen label's probability that a new label needs to get each place instead.

    Args:
        k: Number of places.
        reserved: Number of places at the end to reserve outright. ``None`` reserves the last two of each ten, for new
            labels at least a tenth as probable as the seen label.

    >>> handicaps(4, 1).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    places = np.arange(k)
    if reserved is None:
        return np.where(places % PERIOD >= PERIOD - RESERVED, ENOUGH, 1.0)
    return np.where(places >= k - reserved, 0.0, 1.0)


def with_new_labels(seen: TopK, new: TopK, needed: np.ndarray) -> TopK:
    """Return the best labels of both kinds, by probability, with places reserved for new labels.

    A place goes to the next new label if it has more than the needed fraction of the probability of the next seen
    label, or if no fraction is needed. The places after the last label of one kind go to the other.

    Args:
        seen, new: ``(N, s)`` and ``(N, n)``, labels of each kind with their probabilities, best first.
        needed: ``(k,)``, as :func:`handicaps` returns it.

    >>> seen = TopK(np.array([[0, 1, 2, 3]]), np.array([[0.9, 0.6, 0.4, 0.3]]))
    >>> new = TopK(np.array([[8, 9]]), np.array([[0.5, 0.1]]))
    >>> with_new_labels(seen, new, handicaps(4, 1)).label_ids
    array([[0, 1, 8, 9]])
    """
    rows, num_places = np.arange(len(seen.label_ids)), len(needed)
    seen, new = _padded(seen), _padded(new)
    best = TopK.empty(len(rows), num_places, np.float64)
    of_seen, of_new = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for place in range(num_places):
        labels, others = seen.label_ids[rows, of_seen], new.label_ids[rows, of_new]
        scores, probabilities = seen.scores[rows, of_seen], new.scores[rows, of_new]
        wins = (labels < 0) | (probabilities > needed[place] * scores) | (needed[place] == 0)
        wins &= others >= 0
        best.label_ids[:, place] = np.where(wins, others, labels)
        best.scores[:, place] = np.where(wins, probabilities, scores)
        of_seen += ~wins & (labels >= 0)
        of_new += wins
    best.scores[best.label_ids < 0] = -np.inf
    return best


def _padded(found: TopK) -> TopK:
    """Return labels with one column of padding more."""
    return TopK(*(np.concatenate(parts, 1) for parts in zip(found, TopK.empty(len(found.label_ids), 1), strict=True)))
