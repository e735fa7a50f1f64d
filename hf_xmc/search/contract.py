"""The interface of every index, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_xmc.topk import TopK


class LabelSearch(Protocol):
    """A search for the best labels of queries: a :class:`hf_xmc.LabelIndex`, or an index of several texts per label."""

    @property
    def num_labels(self) -> int:
        """The number of labels, whose ids are 0 to ``num_labels - 1``."""

    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
    ) -> TopK:
        """Return the ``k`` best labels of each query; see :meth:`hf_xmc.LabelIndex.search`."""


def visible_labels(
    num_labels: int, allow: Iterable[int] | None = None, deny: Iterable[int] | None = None
) -> np.ndarray | None:
    """Return an ``(L,)`` mask of the labels that may be returned; ``None`` if all may.

    Raises:
        ValueError: if an id is out of range.

    >>> visible_labels(4, allow=[0, 1, 2], deny=[1]).tolist()
    [True, False, True, False]
    """
    if allow is None and deny is None:
        return None
    visible = np.full(num_labels, allow is None)
    if allow is not None:
        visible[checked_ids(allow, num_labels)] = True
    if deny is not None:
        visible[checked_ids(deny, num_labels)] = False
    return visible


def checked_ids(label_ids: Iterable[int], num_labels: int) -> np.ndarray:
    """Return label ids as an array of int64.

    Raises:
        ValueError: if an id is not from 0 to ``num_labels - 1``.
    """
    chosen = np.array(list(label_ids), dtype=np.int64)
    for wrong in chosen[(chosen < 0) | (chosen >= num_labels)][:1]:
        raise ValueError(f"label ids must be from 0 to {num_labels - 1}, got {wrong}.")
    return chosen


def checked_pairs(exclude: np.ndarray | None, num_queries: int, num_labels: int) -> Tensor:
    """Return excluded pairs (row of the query, label id) as an ``(M, 2)`` tensor of int64.

    Raises:
        ValueError: if a row or a label id is out of range.
    """
    if exclude is None or len(exclude) == 0:
        return torch.empty((0, 2), dtype=torch.long)
    pairs = torch.as_tensor(np.asarray(exclude, dtype=np.int64))
    wrong = ((pairs < 0) | (pairs >= torch.tensor([num_queries, num_labels]))).any(1)
    for row, label in pairs[wrong][:1].tolist():
        raise ValueError(
            f"`exclude` has query {row} and label {label}, but there are {num_queries} queries and {num_labels} "
            "labels. Do the pairs belong to this split?"
        )
    return pairs
