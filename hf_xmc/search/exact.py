"""Finding the best labels of a query among all of them, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_xmc.search.equal_rows import Groups, codes_of, first_equal
from hf_xmc.topk import TopK, checked_k

QUERY_BLOCK, LABEL_CHUNK = 512, 16384  # at most 32 MiB of scores at a time; few queries take longer chunks
TORN_AT_ONCE = 16  # queries of which many labels are sorted together


class LabelIndex:
    """Exact search by dot product. For cosines, embeddings have unit norm.

    Labels of equal embeddings get equal scores, and come in the order of their ids. An index that cannot be changed as
    asked, for any reason, stays as it is.

    Args:
        embeddings: ``(L, D)``, float32 or float16, or bfloat16, which becomes float32. A label's id is its row. Scores
            are computed, and labels ranked, in float32 either way: half precision would tie too many of them.

    Raises:
        ValueError: if the embeddings are not a finite table.
    """

    def __init__(self, embeddings: np.ndarray | Tensor) -> None:
        self.embeddings = _checked(embeddings)
        self._codes = codes_of(self.embeddings)
        self._place(first_equal(self.embeddings, self._codes))

    def _place(self, first: np.ndarray) -> None:
        """Index labels, given the first that is equal to each."""
        self._groups = Groups(first, len(first))

    def add(self, embeddings: np.ndarray | Tensor) -> None:
        """Add labels, ``(A, D)``. Their ids follow those that are there."""
        new = _checked(embeddings, self.embeddings)
        source = np.append(np.arange(self.num_labels), np.full(len(new), -1))
        self._become(torch.cat([self.embeddings, new]), source)

    def remove(self, label_ids: Iterable[int]) -> None:
        """Remove labels. The ids of those after them move up, as in a list."""
        kept = np.flatnonzero(~self._marked(label_ids))
        self._become(self.embeddings[torch.from_numpy(kept)], kept)

    def replace(self, label_ids: Sequence[int], embeddings: np.ndarray | Tensor) -> None:
        """Give labels other embeddings, ``(len(label_ids), D)``. They keep their ids."""
        new, rows = _checked(embeddings, self.embeddings), self._checked_ids(label_ids)
        if len(new) != len(rows):
            raise ValueError(f"{len(rows)} label ids and {len(new)} embeddings: each label needs one.")
        source = np.arange(self.num_labels)
        source[rows] = -1
        self._become(self.embeddings.index_copy(0, torch.from_numpy(rows), new), source)

    def _become(self, embeddings: Tensor, source: np.ndarray) -> None:
        """Take another table. ``source`` is the row that each row had before; -1 if it is new."""
        codes = np.empty(len(source), dtype=np.uint64)
        codes[source >= 0] = self._codes[source[source >= 0]]
        codes[source < 0] = codes_of(embeddings[torch.from_numpy(source < 0)])
        groups = self._regrouped(embeddings, first_equal(embeddings, codes), source)
        self.embeddings, self._codes, self._groups = embeddings, codes, groups

    def _regrouped(self, embeddings: Tensor, first: np.ndarray, source: np.ndarray) -> Groups:
        """Return the places of another table, having made them; here a place is a row."""
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
        """The ``k`` best labels of each query; of equal scores the smaller label id comes first.

        Args:
            queries: ``(N, D)``.
            k: where a query has fewer labels to choose from, the rest is padding.
            exclude: ``(M, 2)`` pairs (row of the query, label id) never returned, such as a benchmark's filter pairs.
            allow, deny: label ids to choose from, or not to.

        Raises:
            ValueError: if shapes do not fit, a query is not finite, or an id is out of range.
        """
        queries = torch.as_tensor(queries).float()
        if queries.ndim != 2 or queries.shape[1] != self.embedding_dim:
            raise ValueError(f"queries have shape {tuple(queries.shape)}; expected (N, {self.embedding_dim}).")
        k = checked_k(k)
        _refuse_non_finite(queries, "query")
        visible = self.visible(allow, deny)
        groups = self._groups if visible is None else self._groups.restricted(visible)
        pairs = self._checked_pairs(exclude, len(queries))
        blocks = [
            self._search_block(
                queries[start : start + QUERY_BLOCK], k, groups, rows_of(pairs, start, start + QUERY_BLOCK)
            )
            for start in range(0, len(queries), QUERY_BLOCK)
        ]
        if not blocks:
            return TopK(np.empty((0, k), dtype=np.int64), np.empty((0, k), dtype=np.float32))
        scores, label_ids = (torch.cat(parts).numpy() for parts in zip(*blocks, strict=True))
        return TopK(label_ids, scores)

    def _search_block(self, queries: Tensor, k: int, groups: Groups, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Score the first label of each place, and give its score to the others that are there."""
        # Places come in the order of their first labels. If some of these are not returned, a tie may hold more places.
        more = groups.shared and bool(len(pairs) or groups.partial)
        return self._labels_of_best(queries, k, groups, pairs, k + more)

    def _labels_of_best(
        self, queries: Tensor, k: int, groups: Groups, pairs: Tensor, asked: int
    ) -> tuple[Tensor, Tensor]:
        """Return the best ``k`` labels of the best ``asked`` places, and of more if those behind score the same."""
        best, best_ids = self._best_places(queries, asked, groups, pairs)
        if not groups.shared:
            return best, best_ids.masked_fill(best == -torch.inf, -1)
        places = groups.place_of[best_ids.numpy()]
        scores, label_ids = map(torch.from_numpy, groups.best(places, best.numpy(), k, pairs.numpy())[::-1])
        if k < asked < self.num_labels:
            torn = ((best[:, -1] == scores[:, -1]) & (best[:, -1] > -torch.inf)).nonzero()[:, 0]
            for start in range(0, len(torn), TORN_AT_ONCE):
                rows = torn[start : start + TORN_AT_ONCE]
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
        whole = self.embeddings.dtype == torch.float32  # half precision is copied, in pieces that stay in the cache
        chunk = LABEL_CHUNK * QUERY_BLOCK // len(queries) if whole else LABEL_CHUNK
        for start in range(0, self.num_labels, chunk):
            stop = min(start + chunk, self.num_labels)
            # By numpy's BLAS: on AMD processors it takes 0.4 of the time of torch's, for one query and for many.
            scores = torch.from_numpy(queries.numpy() @ self.embeddings[start:stop].float().numpy().T)
            first, last = np.searchsorted(groups.idle, [start, stop])
            if first < last:
                scores.index_fill_(1, torch.from_numpy(groups.idle[first:last] - start), -torch.inf)
            here = (start <= label_ids) & (label_ids < stop)
            scores[rows[here], label_ids[here] - start] = -torch.inf
            new, new_ids = _top_k(scores, k)
            # Earlier chunks have the smaller ids and stand first, so a stable sort keeps ties in the order of ids.
            best, order = torch.cat([best, new], 1).sort(dim=1, descending=True, stable=True)
            best_ids = torch.cat([best_ids, new_ids + start], 1).gather(1, order)[:, :k]
            best = best[:, :k]
        return best, best_ids

    def visible(self, allow: Iterable[int] | None = None, deny: Iterable[int] | None = None) -> np.ndarray | None:
        """``(L,)``, whether a label may be returned; ``None`` where all may.

        Raises:
            ValueError: if an id is out of range.
        """
        if allow is None and deny is None:
            return None
        visible = np.ones(self.num_labels, dtype=bool) if allow is None else self._marked(allow)
        return visible if deny is None else visible & ~self._marked(deny)

    def _marked(self, label_ids: Iterable[int]) -> np.ndarray:
        marked = np.zeros(self.num_labels, dtype=bool)
        marked[self._checked_ids(label_ids)] = True
        return marked

    def _checked_ids(self, label_ids: Iterable[int]) -> np.ndarray:
        chosen = np.array(list(label_ids), dtype=np.int64)
        for wrong in chosen[(chosen < 0) | (chosen >= self.num_labels)][:1]:
            raise ValueError(f"label id {wrong} is not one of {self.num_labels} labels.")
        return chosen

    def _checked_pairs(self, exclude: np.ndarray | None, num_queries: int) -> Tensor:
        if exclude is None or len(exclude) == 0:
            return torch.empty((0, 2), dtype=torch.long)
        pairs = torch.as_tensor(np.asarray(exclude, dtype=np.int64))
        wrong = ((pairs < 0) | (pairs >= torch.tensor([num_queries, self.num_labels]))).any(1)
        for row, label in pairs[wrong][:1].tolist():
            raise ValueError(
                f"exclude names query {row} and label {label}, but there are {num_queries} queries and "
                f"{self.num_labels} labels: are the pairs those of this split?"
            )
        return pairs


def of_recognised(found: TopK, queries: Tensor) -> TopK:
    """Return ``found`` with padding alone for queries ``(N, D)`` that embed to zero: nothing in them was recognised."""
    known = queries.any(1).numpy()[:, None]
    return TopK(np.where(known, found.label_ids, -1), np.where(known, found.scores, -np.inf).astype(np.float32))


def _checked(embeddings: np.ndarray | Tensor, like: Tensor | None = None) -> Tensor:
    embeddings = torch.as_tensor(embeddings).detach().cpu()
    embeddings = embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings  # which numpy does not have
    if embeddings.ndim != 2 or embeddings.dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"label embeddings are a (L, D) table of float32 or float16, got shape {tuple(embeddings.shape)} of "
            f"{embeddings.dtype}."
        )
    if like is not None and embeddings.shape[1] != like.shape[1]:
        raise ValueError(f"the labels there have embeddings of {like.shape[1]} numbers, got {embeddings.shape[1]}.")
    embeddings = embeddings if like is None else embeddings.to(like.dtype)
    _refuse_non_finite(embeddings, "label")
    return embeddings


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, ties in the order of their columns; fewer columns are all returned."""
    best, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if best.shape[1] > k:
        # Which of several equal scores `topk` keeps is left open. It matters where a tie crosses the border.
        torn = (best[:, k] == best[:, k - 1]) & (best[:, k] > -torch.inf)
        best, columns = best[:, :k], columns[:, :k]
        for row in torn.nonzero()[:, 0].tolist():
            candidates = (scores[row] >= best[row, -1]).nonzero()[:, 0]
            order = scores[row, candidates].sort(descending=True, stable=True).indices[:k]
            best[row], columns[row] = scores[row, candidates[order]], candidates[order]
    columns, order = columns.sort(dim=1)
    best, by_score = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, by_score)


def rows_of(pairs: Tensor, start: int, stop: int) -> Tensor:
    """The pairs of some rows, counted from the first of these."""
    if not len(pairs):
        return pairs
    here = pairs[(start <= pairs[:, 0]) & (pairs[:, 0] < stop)]
    return here - torch.tensor([start, 0])


def _refuse_non_finite(embeddings: Tensor, what: str) -> None:
    for start in range(0, len(embeddings), LABEL_CHUNK):
        finite = embeddings[start : start + LABEL_CHUNK].isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"the embedding of {what} {start + int(finite.logical_not().nonzero()[0])} is not finite: the encoder "
                "has diverged, or its weights are broken."
            )
