"""Mix the votes of training queries with the scores of labels, and choose the best labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from hf_xmc.search.equal_rows import best_of_rows
from hf_xmc.topk import TopK

CELLS = 2**20  # maximum size of the table of queries and labels in which votes are added up: 8 MiB


class Votes(NamedTuple):
    """Single votes, one after another. A query may vote for one label several times."""

    rows: np.ndarray  # (V,), the query of each vote, in ascending order
    label_ids: np.ndarray  # (V,)
    weights: np.ndarray  # (V,) float64


def votes_of(neighbors: np.ndarray, weights: np.ndarray, relevance: sp.csr_array) -> Votes:
    """Return a vote for each label of each neighbor, in the order of the neighbors.

    Args:
        neighbors: ``(N, n)`` rows of ``relevance``; -1 for padding.
        weights: ``(N, n)`` weights of the neighbors.
        relevance: Sparse ``(M, L)`` matrix of ones.
    """
    rows = np.nonzero(neighbors >= 0)[0]
    known, weights = neighbors[neighbors >= 0], weights[neighbors >= 0]
    starts = relevance.indptr[known].astype(np.int64)
    sizes = relevance.indptr[known + 1] - starts
    ends = sizes.cumsum()
    places = np.arange(sizes.sum()) + np.repeat(starts + sizes - ends, sizes)
    return Votes(np.repeat(rows, sizes), relevance.indices[places], np.repeat(weights, sizes))


def probabilities(found: TopK, temperature: float, num_best: int) -> np.ndarray:
    """Return the ``(N, k)`` softmax of scores over the best ``num_best`` labels; 0 for padding.

    The probability of a label does not depend on the number of labels in ``found``.
    """
    scaled = found.scores.astype(np.float64) / temperature
    with np.errstate(invalid="ignore"):
        powers = np.exp(scaled - scaled[:, :1])
        values = powers / powers[:, :num_best].sum(1, keepdims=True)
    # The smallest positive number keeps labels with a very low score among the candidates.
    return np.where(found.label_ids >= 0, np.maximum(values, np.finfo(np.float64).tiny), 0)


def best_mixed(
    label_ids: np.ndarray,
    own: np.ndarray,
    votes: Votes,
    hidden: np.ndarray,
    mix: float,
    penalty: np.ndarray,
    first_penalty: np.ndarray,
    k: int,
) -> TopK:
    """Return the ``k`` labels with the largest ``log((1 - mix) * own + mix * sum of votes) - penalty``.

    The first label is the one with the largest score under ``first_penalty``, and keeps that score. Of equal scores the
    smaller label id comes first. A label with neither a weight nor a vote is left out.

    Args:
        label_ids: ``(N, c)`` labels with a weight of their own, padded with -1.
        own: ``(N, c)``, these weights; 0 for padding.
        votes: Votes for any labels.
        hidden: ``(M, 2)`` pairs (query, label) whose votes do not count.
        mix: Weight of the votes.
        penalty: ``(L,)``, what is subtracted from the score of each label but the first.
        first_penalty: ``(L,)``, the same for the first; nowhere larger than ``penalty``.
        k: Number of labels.
    """
    step = max(1, CELLS // max(1, len(penalty)))
    best, sums = TopK.empty(len(label_ids), k), np.zeros(min(step, len(label_ids)) * len(penalty))
    for start in range(0, len(label_ids), step):
        here = slice(start, start + step)
        first, last = np.searchsorted(votes.rows, [start, start + step])
        some = Votes(votes.rows[first:last] - start, *(part[first:last] for part in votes[1:]))
        mine = hidden[(start <= hidden[:, 0]) & (hidden[:, 0] < start + step)] - [start, 0] if len(hidden) else hidden
        best.label_ids[here], best.scores[here] = _best_of_block(
            sums, label_ids[here], own[here], some, mine, mix, penalty, first_penalty, k
        )
    return best


def _best_of_block(
    sums: np.ndarray,
    label_ids: np.ndarray,
    own: np.ndarray,
    votes: Votes,
    hidden: np.ndarray,
    mix: float,
    penalty: np.ndarray,
    first_penalty: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best labels of a few queries; ``sums`` is a table of zeros, which stays one."""
    num_queries, num_labels = len(label_ids), len(penalty)
    cells = votes.rows * num_labels + votes.label_ids
    np.add.at(sums, cells, votes.weights)
    if len(hidden):
        sums[hidden[:, 0] * num_labels + hidden[:, 1]] = 0
    own_cells = np.arange(num_queries)[:, None] * num_labels + label_ids  # padding is the cell before, with weight 0
    with np.errstate(divide="ignore"):
        mixed = (1 - mix) * own + mix * sums[own_cells] * (label_ids >= 0)
        scores = np.where(label_ids >= 0, np.log(mixed), -np.inf)
        sums[own_cells[label_ids >= 0]] = 0  # what is left are votes for other labels
        left = np.flatnonzero(sums[cells])
        more = np.log(mix * sums[cells[left]])
    order = np.arange(len(left))
    sums[cells[left]] = order
    once = sums[cells[left]] == order  # one of several votes for a label
    sums[cells] = 0
    left, more = left[once], more[once]
    rows, more_ids = votes.rows[left], votes.label_ids[left]
    firsts, more_firsts = scores - first_penalty[label_ids], more - first_penalty[more_ids]
    best = firsts.max(1, initial=-np.inf)
    np.maximum.at(best, rows, more_firsts)
    scores = np.where(firsts == best[:, None], firsts, scores - penalty[label_ids])
    more = np.where(more_firsts == best[rows], more_firsts, more - penalty[more_ids])
    border = _kth_largest(scores, rows, more, k)
    own_rows, columns = np.nonzero((scores >= border[:, None]) & (scores > -np.inf))
    among = (more >= border[rows]) & (more > -np.inf)
    return best_of_rows(
        np.concatenate([own_rows, rows[among]]),
        np.concatenate([label_ids[own_rows, columns], more_ids[among]]),
        np.concatenate([scores[own_rows, columns], more[among]]),
        num_queries,
        k,
    )


def _kth_largest(scores: np.ndarray, rows: np.ndarray, more: np.ndarray, k: int) -> np.ndarray:
    """Return the ``k``-th largest score of each row; ``more`` has further scores, in ascending order of ``rows``."""
    counts = np.bincount(rows, minlength=len(scores))
    wide = np.full((len(scores), scores.shape[1] + counts.max(initial=0)), -np.inf)
    if wide.shape[1] <= k:
        return np.full(len(scores), -np.inf)
    wide[:, : scores.shape[1]] = scores
    wide[rows, scores.shape[1] + np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = more
    largest: np.ndarray = -np.partition(-wide, k - 1, axis=1)[:, k - 1]
    return largest
