"""Several texts for one label: an index of texts, searched as one of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_xmc.data.labels import LabelTexts
from hf_xmc.search.exact import LabelIndex
from hf_xmc.topk import TopK, checked_k, distinct


class GroupedIndex(LabelIndex):
    """An index of texts that finds labels: the score of a label is the largest of its texts'.

    Texts are asked for until there are ``k`` labels, so the result is as exact as the index.

    Args:
        index: of ``T`` texts.
        label_of: ``(T,)``, the label of each text: all from 0 to L-1, rising.

    Raises:
        ValueError: if ``label_of`` does not name the label of each text in this way.
    """

    def __init__(self, index: LabelIndex, label_of: np.ndarray) -> None:
        steps = np.diff(label_of, prepend=-1)
        if len(label_of) != index.num_labels or (len(steps) and steps[0] != 1) or not np.isin(steps, (0, 1)).all():
            raise ValueError(
                f"`label_of` must hold the label of each of {index.num_labels} texts, from 0 up and none left out."
            )
        self.index, self.label_of = index, label_of
        self._size = np.bincount(label_of)  # (L,)
        self._start = self._size.cumsum() - self._size

    def add(self, embeddings: np.ndarray | Tensor) -> None:
        """Refuse: it is not said which label a text would be of."""
        raise ValueError("labels with several texts are changed in the model, or in the index of their texts.")

    def remove(self, label_ids: Iterable[int]) -> None:
        """Refuse, as :meth:`add`."""
        self.add(np.empty(0))

    def replace(self, label_ids: Sequence[int], embeddings: np.ndarray | Tensor) -> None:
        """Refuse, as :meth:`add`."""
        self.add(embeddings)

    @property
    def num_labels(self) -> int:
        return len(self._size)

    @property
    def embedding_dim(self) -> int:
        return self.index.embedding_dim

    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
    ) -> TopK:
        """The ``k`` best labels of each query; arguments as in :meth:`LabelIndex.search`."""
        queries, k = torch.as_tensor(queries).float(), checked_k(k)
        visible = self.visible(allow, deny)
        texts = None if visible is None else np.flatnonzero(visible[self.label_of])
        pairs = self._text_pairs(self._checked_pairs(exclude, len(queries)).numpy())
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
        """Pairs (row, text) of pairs (row, label)."""
        sizes = self._size[pairs[:, 1]]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        return np.stack([np.repeat(pairs[:, 0], sizes), np.repeat(self._start[pairs[:, 1]], sizes) + within], axis=1)


def label_index(index: LabelIndex, table: LabelTexts) -> LabelIndex:
    """Return an index of the texts of ``table`` as one of its labels; the same index if each label has one text."""
    return GroupedIndex(index, table.label_of) if table.several else index
