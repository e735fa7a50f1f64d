"""Find queries that a memory already holds, so that no query votes for itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_xmc.search.exact import QUERY_BLOCK, LabelIndex

ASKED = 16  # nearest rows to compare; more if all of them are equal
CLOSE, EQUAL = 0.99, 2e-3  # least cosine to compare, and the largest distance that rounding to half precision causes


def equal_texts(known: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Return the ``(M, 2)`` pairs (row of ``texts``, row of ``known``) of equal strings.

    >>> equal_texts(["boat", "car", "boat"], ["dog", "boat"]).tolist()
    [[1, 0], [1, 2]]
    """
    rows: dict[str, list[int]] = {text: [] for text in texts}
    for row, text in enumerate(known):
        if text in rows:
            rows[text].append(row)
    return _pairs([(number, row) for number, text in enumerate(texts) for row in rows[text]])


def equal_embeddings(index: LabelIndex, queries: np.ndarray | Tensor) -> np.ndarray:
    """Return the ``(M, 2)`` pairs (query, row of ``index``) whose embeddings have the same direction.

    Args:
        index: Index of unit embeddings, possibly in half precision.
        queries: ``(N, D)``, of any norm. A zero row equals nothing.
    """
    queries = normalize(torch.as_tensor(queries).float())
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(queries), QUERY_BLOCK):
        rows, asked = np.arange(start, min(start + QUERY_BLOCK, len(queries))), min(ASKED, index.num_labels)
        while len(rows) and asked:
            found = index.search(queries[torch.from_numpy(rows)], asked)
            close = np.argwhere(found.scores > CLOSE)
            stored = index.embeddings[torch.from_numpy(found.label_ids[close[:, 0], close[:, 1]])].float()
            apart = (stored - queries[torch.from_numpy(rows[close[:, 0]])]).norm(dim=1).numpy()
            equal = close[apart <= EQUAL]
            full = np.bincount(equal[:, 0], minlength=len(rows)) == asked
            full &= asked < index.num_labels
            pairs += [(rows[n], found.label_ids[n, place]) for n, place in equal.tolist() if not full[n]]
            rows, asked = rows[full], min(4 * asked, index.num_labels)
    return _pairs(pairs)


def _pairs(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
