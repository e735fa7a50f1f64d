"""The part of an approximate index that finds candidates, for subclassing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Change(NamedTuple):
    """A change of the labels of an index, the argument of :meth:`Candidates.update`."""

    before: Tensor  # (L, D), the embeddings of all labels before the change
    after: Tensor  # (M, D), the embeddings of all labels after the change
    added_rows: np.ndarray  # (A,), the row of `after` for each new place; new places follow all earlier ones
    removed: np.ndarray  # (R,), places that no label uses any more
    removed_rows: np.ndarray  # (R,), a row of `before` for each removed place
    num_used: int  # number of places with a label after the change

    def added_vectors(self) -> np.ndarray:
        """Return the ``(A, D)`` vectors of the new places, in float32."""
        return vectors_of(self.after, self.added_rows)

    def removed_vectors(self) -> np.ndarray:
        """Return the ``(R, D)`` vectors of the removed places, in float32."""
        return vectors_of(self.before, self.removed_rows)


class Candidates(ABC):
    """Base class of searches that find candidates for :class:`hf_xmc.search.approximate.ApproximateIndex`.

    To write your own index, subclass this class and pass an instance to ``ApproximateIndex``. The index finds
    equal embeddings, checks arguments, scores the candidates in float32, breaks ties, and searches exactly if there are
    too few candidates. A subclass stores vectors and returns the places of vectors with a large inner product.

    The place of a vector is its number in the order of arrival. Places are never reused until the next ``build``.

    Attributes:
        max_candidates: Maximum number of candidates of one query. The index searches exactly if it needs more.
        error: Upper bound of the distance between a vector and the code it is scored by, if ``nearest`` scores every
            vector. The index then requests candidates until no other vector can be better. ``None`` if vectors may be
            skipped.
        is_graph: Whether a search walks from vector to vector, so that each further candidate costs more. The index
            then searches exactly more often.

    >>> class Rounded(Candidates):  # scores all vectors in whole numbers
    ...     def build(self, vectors, embeddings):
    ...         self.codes = np.rint(16 * vectors).astype(np.int8)
    ...     @property
    ...     def num_places(self):
    ...         return len(self.codes)
    ...     def nearest(self, queries, k, visible):
    ...         scores = queries @ self.codes.T / 16
    ...         if visible is not None:
    ...             scores[:, ~visible] = -np.inf
    ...         places = np.argsort(-scores, axis=1)[:, :k]
    ...         return np.take_along_axis(scores, places, 1), places
    >>> from hf_xmc.search.approximate import ApproximateIndex
    >>> index = ApproximateIndex(np.eye(50, dtype=np.float32), Rounded())
    >>> index.search(index.embeddings[[7]], 1).label_ids
    array([[7]])
    """

    max_candidates = 2**31
    error: float | None = None
    is_graph = False

    @abstractmethod
    def build(self, vectors: np.ndarray, embeddings: Tensor) -> None:
        """Replace all vectors.

        The previous vectors must stay in use if this method fails.

        Args:
            vectors: ``(P, D)`` float32, all different. Their places are 0 to P - 1.
            embeddings: ``(L, D)``, the embeddings of all labels, whose distinct rows are ``vectors``.
        """

    def update(self, change: Change) -> bool:
        """Add and remove vectors, and return whether this was possible.

        The index calls :meth:`build` with all vectors if the result is false, which is the default. The previous
        vectors must stay in use if this method fails. Removed vectors may stay, too: the index never returns them.
        """
        return False

    @property
    @abstractmethod
    def num_places(self) -> int:
        """The number of places assigned since the last :meth:`build`, removed ones included."""

    @abstractmethod
    def nearest(self, queries: np.ndarray, k: int, visible: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the approximate scores and the places of the nearest vectors, best first.

        Args:
            queries: ``(B, D)`` float32.
            k: Number of candidates, at most :attr:`num_places`.
            visible: ``(num_places,)`` mask of the places to search; ``None`` for all places.

        Returns:
            Two arrays ``(B, k)``, which may be wider. Pad places with -1. Hidden places are ignored.
        """


def vectors_of(embeddings: Tensor, rows: np.ndarray) -> np.ndarray:
    """Return rows of a table as one block of float32."""
    return np.ascontiguousarray(embeddings[torch.from_numpy(rows)].float().numpy())


def checked_count(name: str, value: int) -> int:
    """Return a number as a plain integer.

    Raises:
        ValueError: if it is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    return int(value)
