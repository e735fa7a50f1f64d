r"""Labels that training never saw: their scores, their probabilities, and their places among the other labels.

Training teaches the norm of a label's embedding, which is large for frequent labels, and memory and calibration know
seen labels only. So new labels are ranked among themselves, by

.. math:: s_l = \max_{t \in l} \big(\cos(f(q), f(t)) + \cos(\text{tfidf}(q), \text{tfidf}(t))\big),

and a map from this score to a probability lets them compete with seen labels (calibrated stacking, Chao et al., ECCV
2016, with probabilities instead of a constant).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_xmc.metrics.calibration import Calibration
from hf_xmc.search.equal_rows import best_of_rows
from hf_xmc.search.lexical import SharedWords, WordCounts
from hf_xmc.tensors import unit_rows
from hf_xmc.topk import TopK

CELLS = 2**22  # of a dense block of scores: 16 MiB


@dataclass(frozen=True, eq=False)
class NewLabelScores:
    """The knowledge of a model about labels that it has not seen yet.

    Attributes:
        calibration: The map from the scores of new labels to probabilities.
        words: The words of the texts of the training, whose rarity weighs words that a text and a label share.
    """

    calibration: Calibration
    words: WordCounts


class NewLabelSearch:
    """A search among new labels.

    Args:
        label_ids: ``(N,)``, the ids of the new labels, in ascending order.
        label_of: ``(T,)``, the position in ``label_ids`` of the label of each text, in ascending order without a gap.
        embeddings: ``(T, D)``, the embeddings of the texts, of any norm.
        texts: The ``T`` texts, with the words by which they are compared with queries.
        words: Words of the known texts.
    """

    def __init__(
        self, label_ids: np.ndarray, label_of: np.ndarray, embeddings: Tensor, texts: Sequence[str], words: WordCounts
    ) -> None:
        self.label_ids = label_ids
        self._starts = np.flatnonzero(np.diff(label_of, prepend=-1))
        self._embeddings = unit_rows(embeddings).float().numpy()
        self._shared = SharedWords(texts, words)

    def search(
        self,
        texts: Sequence[str],
        queries: Tensor,
        k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: np.ndarray | None = None,
    ) -> TopK:
        """Return the best ``k`` new labels of each text; of equal scores the smaller label id comes first.

        Args:
            texts: ``N`` texts.
            queries: ``(N, D)``, their embeddings. A text that embeds to zero has no label.
            k: Number of labels.
            exclude: ``(M, 2)`` pairs (row of the text, label id) that are not returned.
            allow: Label ids to choose from; ``None`` for all.
        """
        best = TopK.empty(len(texts), k)
        units = torch.nn.functional.normalize(queries.float()).numpy()
        hidden = np.zeros(len(self.label_ids), bool) if allow is None else ~np.isin(self.label_ids, allow)
        pairs = self._own(exclude)
        step = max(1, CELLS // max(1, len(self._embeddings)))
        for start in range(0, len(texts), step):
            here = slice(start, start + step)
            scores = units[here] @ self._embeddings.T
            scores += self._shared.cosines(texts[here]).toarray()
            scores = np.maximum.reduceat(scores, self._starts, axis=1)  # (n, N)
            scores[:, hidden] = -np.inf
            scores[~units[here].any(1)] = -np.inf
            mine = pairs[(start <= pairs[:, 0]) & (pairs[:, 0] < start + step)]
            scores[mine[:, 0] - start, mine[:, 1]] = -np.inf
            num_best = min(k, scores.shape[1])
            border = -np.partition(-scores, num_best - 1, axis=1)[:, num_best - 1]
            rows, places = np.nonzero((scores >= border[:, None]) & (scores > -np.inf))
            found = rows, self.label_ids[places], scores[rows, places]
            best.label_ids[here], best.scores[here] = best_of_rows(*found, len(scores), k)
        return best

    def _own(self, exclude: np.ndarray | None) -> np.ndarray:
        """Return the pairs of new labels, with positions in place of label ids."""
        pairs = np.empty((0, 2), np.int64) if exclude is None else np.asarray(exclude, np.int64).reshape(-1, 2)
        pairs = pairs[np.isin(pairs[:, 1], self.label_ids)]
        return np.stack([pairs[:, 0], np.searchsorted(self.label_ids, pairs[:, 1])], axis=1)
