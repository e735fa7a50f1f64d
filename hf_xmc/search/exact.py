"""Exact search: every label is scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_xmc.search.contract import checked_ids, checked_pairs, visible_labels
from hf_xmc.search.equal_rows import Groups, codes_of, first_equal
from hf_xmc.topk import TopK, checked_k

QUERY_BLOCK, LABEL_CHUNK = 512, 16384  # at most 32 MiB of scores at a time; with few queries the chunks are longer
FEW = 1 / 20  # labels: if at most this fraction of them is visible, only their rows are read
TIED_AT_ONCE = 16  # queries with ties at the border whose labels are sorted together


class LabelIndex:
    """Exact search by dot product. For cosine similarity, pass embeddings of unit norm.

    Labels with equal embeddings get equal scores, and are returned in the order of their ids. If a change of the index
    fails for any reason, the index stays as it was.

    This class has all methods that an index of :class:`hf_xmc.XMCModel` needs. To write a faster index, subclass
    :class:`hf_xmc.search.candidates.Candidates`.

    Args:
        embeddings: ``(L, D)`` float32, float16, or bfloat16, which is converted to float32. The id of a label is its
            row. Scores are computed and compared in float32, because half precision would tie too many of them.
        check: Whether to read all rows now, to refuse numbers that are not finite and to find equal rows. Otherwise
            the first search or change finds equal rows, and nothing is refused.

    Raises:
        ValueError: if the embeddings are not a matrix of finite numbers of one of these types.

    >>> index = LabelIndex(np.eye(3, dtype=np.float32))
    >>> index.search(np.array([[0.1, 0.9, 0.5]]), 2).label_ids
    array([[1, 2]])
    """

    def __init__(self, embeddings: np.ndarray | Tensor, *, check: bool = True) -> None:
        self.embeddings = _checked(embeddings, check=check)
        if check:
            _ = self._groups

    @cached_property
    def _codes(self) -> np.ndarray:
        return codes_of(self.embeddings)

    @cached_property
    def _groups(self) -> Groups:
        first = first_equal(self.embeddings, self._codes)
        return Groups(first, len(first))  # the place of a label is the row of the first equal label

    def add(self, embeddings: np.ndarray | Tensor) -> None:
        """Add labels, given their ``(A, D)`` embeddings. Their ids follow the existing ones."""
        new = _checked(embeddings, self.embeddings)
        source = np.append(np.arange(self.num_labels), np.full(len(new), -1))
        self._become(torch.cat([self.embeddings, new]), source)

    def remove(self, label_ids: Iterable[int]) -> None:
        """Remove labels. Later labels move up, as in a list."""
        kept = np.delete(np.arange(self.num_labels), checked_ids(label_ids, self.num_labels))
        self._become(self.embeddings[torch.from_numpy(kept)], kept)

    def replace(self, label_ids: Sequence[int], embeddings: np.ndarray | Tensor) -> None:
        """Replace the embeddings of labels by others, ``(len(label_ids), D)``. The labels keep their ids."""
        new, rows = _checked(embeddings, self.embeddings), checked_ids(label_ids, self.num_labels)
        if len(new) != len(rows):
            raise ValueError(f"`embeddings` must have a row for each of {len(rows)} label ids, got {len(new)} rows.")
        source = np.arange(self.num_labels)
        source[rows] = -1
        self._become(self.embeddings.index_copy(0, torch.from_numpy(rows), new), source)

    def rearrange(self, source: np.ndarray, new: np.ndarray | Tensor) -> None:
        """Replace the table by previous rows in another order, and new rows between them.

        Args:
            source: ``(N,)`` the previous row of each row; -1 for a new row.
            new: ``(A, D)`` embeddings of the new rows, in their order.

        Raises:
            ValueError: if ``new`` does not have one row for each -1 in ``source``, or a row is out of range.
        """
        source = np.asarray(source, dtype=np.int64)
        added, rows = _checked(new, self.embeddings), torch.from_numpy(np.flatnonzero(source < 0))
        checked_ids(source[source >= 0], self.num_labels)
        if len(added) != len(rows):
            raise ValueError(f"`new` must have {len(rows)} rows, one for each -1 in `source`, got {len(added)}.")
        embeddings = self.embeddings[torch.from_numpy(np.maximum(source, 0))]
        self._become(embeddings.index_copy(0, rows, added), source)

    def _become(self, embeddings: Tensor, source: np.ndarray) -> None:
        """Replace the table. ``source`` is the previous row of each row; -1 if the row is new."""
        codes = np.empty(len(source), dtype=np.uint64)
        codes[source >= 0] = self._codes[source[source >= 0]]
        codes[source < 0] = codes_of(embeddings[torch.from_numpy(source < 0)])
        groups = self._regrouped(embeddings, first_equal(embeddings, codes), source)
        self.embeddings, self._codes, self._groups = embeddings, codes, groups

    def _regrouped(self, embeddings: Tensor, first: np.ndarray, source: np.ndarray) -> Groups:
        """Return the places of the labels of another table; ``first`` is the first equal row of each row."""
        return Groups(first, len(first))

    @property
    def num_labels(self) -> int:
        return len(self.embeddings)

    @property
    def embedding_dim(self) -> int:
        return self.embeddings.shape[1]

    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
    ) -> TopK:
        """Return the ``k`` best labels of each query; of equal scores the smaller label id comes first.

        Args:
            queries: ``(N, D)``.
            k: Number of labels. If a query has fewer labels to choose from, its row is padded.
            exclude: ``(M, 2)`` pairs (row of the query, label id) that are not returned, such as the filter pairs of a
                benchmark.
            allow: Label ids to choose from; by default all.
            deny: Label ids that are not returned.

        Raises:
            ValueError: if shapes do not fit, a query is not finite, or an id is out of range.
        """
        queries = torch.as_tensor(queries).float()
        if queries.ndim != 2 or queries.shape[1] != self.embedding_dim:
            raise ValueError(f"`queries` must have shape (N, {self.embedding_dim}), got {tuple(queries.shape)}.")
        k = checked_k(k)
        _refuse_non_finite(queries, "query")
        visible = visible_labels(self.num_labels, allow, deny)
        groups = self._groups if visible is None else self._groups.restricted(visible)
        pairs = checked_pairs(exclude, len(queries), self.num_labels)
        blocks = [
            self._search_block(
                queries[start : start + QUERY_BLOCK], k, groups, rows_of(pairs, start, start + QUERY_BLOCK)
            )
            for start in range(0, len(queries), QUERY_BLOCK)
        ]
        if not blocks:
            return TopK.empty(0, k)
        scores, label_ids = (torch.cat(parts).numpy() for parts in zip(*blocks, strict=True))
        return TopK(label_ids, scores)

    def _search_block(self, queries: Tensor, k: int, groups: Groups, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Score the first label of each place, and give its score to the other labels of the place."""
        # Places are in the order of their first labels. If some labels are hidden, a tie may need one more place.
        more = groups.shared and bool(len(pairs) or groups.partial)
        return self._labels_of_best(queries, k, groups, pairs, k + more)

    def _labels_of_best(
        self, queries: Tensor, k: int, groups: Groups, pairs: Tensor, asked: int
    ) -> tuple[Tensor, Tensor]:
        """Return the best ``k`` labels of the best ``asked`` places, and of more places if the next ones tie."""
        best, best_ids = self._best_places(queries, asked, groups, pairs)
        if not groups.shared:
            return best, best_ids.masked_fill(best == -torch.inf, -1)
        places = groups.place_of[best_ids.numpy()]
        scores, label_ids = map(torch.from_numpy, groups.best(places, best.numpy(), k, pairs.numpy())[::-1])
        if k < asked < self.num_labels:
            tied = ((best[:, -1] == scores[:, -1]) & (best[:, -1] > -torch.inf)).nonzero()[:, 0]
            for start in range(0, len(tied), TIED_AT_ONCE):
                rows = tied[start : start + TIED_AT_ONCE]
                place = torch.full((len(queries),), -1)
                place[rows] = torch.arange(len(rows))
                here = torch.stack([place[pairs[:, 0]], pairs[:, 1]], 1)[place[pairs[:, 0]] >= 0]
                scores[rows], label_ids[rows] = self._labels_of_best(queries[rows], k, groups, here, 4 * asked)
        return scores, label_ids

    def _best_places(self, queries: Tensor, k: int, groups: Groups, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and the first labels of the best ``k`` places; of equal scores the smaller id first."""
        emptied = groups.emptied_by(pairs.numpy())
        emptied[:, 1] = groups.first[emptied[:, 1]]
        rows, label_ids = torch.from_numpy(emptied).T
        best = torch.full((len(queries), k), -torch.inf)
        best_ids = torch.full((len(queries), k), -1)
        full = self.embeddings.dtype == torch.float32  # half precision is converted in pieces that fit in the cache
        chunk = LABEL_CHUNK * QUERY_BLOCK // len(queries) if full else LABEL_CHUNK
        table, idle, kept = self.embeddings, groups.idle, None
        if (1 - FEW) * self.num_labels < len(idle) < self.num_labels:
            # The few others are copied, so that the rest of a mapped file is not read.
            kept = torch.from_numpy(np.delete(np.arange(self.num_labels), idle))
            places = torch.searchsorted(kept, label_ids.contiguous())
            present = torch.isin(label_ids, kept)
            table, idle, rows, label_ids = table[kept], idle[:0], rows[present], places[present]
        for start in range(0, len(table), chunk):
            stop = min(start + chunk, len(table))
            # The BLAS of numpy takes 0.4 of the time of the one of torch on AMD processors.
            scores = torch.from_numpy(queries.numpy() @ table[start:stop].float().numpy().T)
            first, last = np.searchsorted(idle, [start, stop])
            if first < last:
                scores.index_fill_(1, torch.from_numpy(idle[first:last] - start), -torch.inf)
            if len(rows):
                here = (start <= label_ids) & (label_ids < stop)
                scores[rows[here], label_ids[here] - start] = -torch.inf
            new, new_ids = _top_k(scores, k)
            # Earlier chunks have smaller ids and come first, so a stable sort keeps ties in the order of ids.
            best, order = torch.cat([best, new], 1).sort(dim=1, descending=True, stable=True)
            best_ids = torch.cat([best_ids, new_ids + start], 1).gather(1, order)[:, :k]
            best = best[:, :k]
        return best, best_ids if kept is None else torch.where(best_ids < 0, -1, kept[best_ids.clamp(min=0)])


def of_recognised(found: TopK, queries: Tensor) -> TopK:
    """Return ``found`` with only padding for queries ``(N, D)`` that embed to zero, as they have no known token."""
    known = queries.any(1).numpy()[:, None]
    return TopK(np.where(known, found.label_ids, -1), np.where(known, found.scores, -np.inf).astype(np.float32))


def _checked(embeddings: np.ndarray | Tensor, like: Tensor | None = None, check: bool = True) -> Tensor:
    embeddings = torch.as_tensor(embeddings).detach().cpu()
    embeddings = embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings  # numpy has no bfloat16
    if embeddings.ndim != 2 or embeddings.dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"`embeddings` must be an (L, D) matrix of float32 or float16, got shape {tuple(embeddings.shape)} of "
            f"{embeddings.dtype}."
        )
    if like is not None and embeddings.shape[1] != like.shape[1]:
        raise ValueError(
            f"`embeddings` must have {like.shape[1]} dimensions, like the existing labels, got {embeddings.shape[1]}."
        )
    embeddings = embeddings if like is None else embeddings.to(like.dtype)
    if check:
        _refuse_non_finite(embeddings, "label")
    return embeddings


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest entries of each row, or all if there are fewer, with ties in column order."""
    best, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if best.shape[1] > k:
        # `topk` keeps any of several equal scores, so rows with a tie at the border are sorted again.
        tied = (best[:, k] == best[:, k - 1]) & (best[:, k] > -torch.inf)
        best, columns = best[:, :k], columns[:, :k]
        for row in tied.nonzero()[:, 0].tolist():
            candidates = (scores[row] >= best[row, -1]).nonzero()[:, 0]
            order = scores[row, candidates].sort(descending=True, stable=True).indices[:k]
            best[row], columns[row] = scores[row, candidates[order]], candidates[order]
    columns, order = columns.sort(dim=1)
    best, by_score = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, by_score)


def rows_of(pairs: Tensor, start: int, stop: int) -> Tensor:
    """Return the pairs of the rows from ``start`` to ``stop``, with rows counted from ``start``."""
    if not len(pairs):
        return pairs
    here = pairs[(start <= pairs[:, 0]) & (pairs[:, 0] < stop)]
    return here - torch.tensor([start, 0])


def _refuse_non_finite(embeddings: Tensor, what: str) -> None:
    for start in range(0, len(embeddings), LABEL_CHUNK):
        finite = embeddings[start : start + LABEL_CHUNK].isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"the embedding of {what} {start + int(finite.logical_not().nonzero()[0])} is not finite. Check "
                "whether the training of the encoder diverged."
            )
