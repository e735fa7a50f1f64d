"""Search for labels that have several texts each, in an index of the texts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hf_xmc.data.labels import LabelTexts
from hf_xmc.search.contract import LabelSearch, checked_pairs, visible_labels
from hf_xmc.search.exact import LabelIndex
from hf_xmc.topk import TopK, checked_k, distinct


class GroupedIndex:
    """A search for labels in an index of their texts. The score of a label is that of its best text.

    It requests texts until it has found ``k`` labels, so the result is as exact as the index. To change labels, change
    the index of texts.

    Args:
        index: Index of ``T`` texts.
        label_of: ``(T,)``, the label of each text, in ascending order from 0 to L-1 without a gap.

    Raises:
        ValueError: if ``label_of`` has another length, is not in ascending order, or leaves out a label.
    """

    def __init__(self, index: LabelIndex, label_of: np.ndarray) -> None:
        steps = np.diff(label_of, prepend=-1)
        if len(label_of) != index.num_labels or (len(steps) and steps[0] != 1) or not np.isin(steps, (0, 1)).all():
            raise ValueError(
                f"`label_of` must have the label of each of the {index.num_labels} texts of `index`, in ascending "
                f"order from 0 without a gap, got {len(label_of)}: {np.asarray(label_of)[:5].tolist()} ..."
            )
        self.index, self.label_of = index, label_of
        self._size = np.bincount(label_of)  # (L,)
        self._start = self._size.cumsum() - self._size

    @property
    def num_labels(self) -> int:
        return len(self._size)

    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
    ) -> TopK:
        """Return the ``k`` best labels of each query; arguments as in :meth:`hf_xmc.LabelIndex.search`."""
        queries, k = torch.as_tensor(queries).float(), checked_k(k)
        visible = visible_labels(self.num_labels, allow, deny)
        texts = None if visible is None else np.flatnonzero(visible[self.label_of])
        pairs = self._text_pairs(checked_pairs(exclude, len(queries), self.num_labels).numpy())
        best = TopK.empty(len(queries), k)
        rows = np.arange(len(queries))
        asked = k + int(self._size.max(initial=1)) - 1
        while True:
            asked = min(asked, len(self.label_of))
            place = np.full(len(queries), -1)
            place[rows] = np.arange(len(rows))
            here = pairs[place[pairs[:, 0]] >= 0]
            here = np.stack([place[here[:, 0]], here[:, 1]], axis=1)
            found = self.index.search(queries[torch.from_numpy(rows)], asked, exclude=here, allow=texts)
            labels = np.where(found.label_ids >= 0, self.label_of[found.label_ids], -1)
            part = distinct(TopK(labels, found.scores), k)
            best.label_ids[rows], best.scores[rows] = part
            short = (part.label_ids[:, -1] < 0) & (found.label_ids[:, -1] >= 0)
            if not short.any() or asked == len(self.label_of):
                return best
            rows, asked = rows[short], 4 * asked

    def _text_pairs(self, pairs: np.ndarray) -> np.ndarray:
        """Return the pairs (row, text) of pairs (row, label)."""
        sizes = self._size[pairs[:, 1]]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        return np.stack([np.repeat(pairs[:, 0], sizes), np.repeat(self._start[pairs[:, 1]], sizes) + within], axis=1)


def label_index(index: LabelIndex, table: LabelTexts) -> LabelSearch:
    """Return a search for the labels of ``table`` in an index of its texts."""
    return GroupedIndex(index, table.label_of) if table.several else index
