"""Rerank the best labels of a text with a cross-encoder, or with a function such as a call of a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from sentence_transformers import CrossEncoder

from hf_xmc.topk import TopK, checked_k

RERANK_TOP_K = 50  # labels of a text that are reranked unless another number is given
TEXTS_AT_ONCE = 16  # of a stream, so that slow answers arrive early


class Candidate(NamedTuple):
    """A label that a reranker scores."""

    uid: str
    text: str
    score: float  # of the model, before calibration


Reranker = Callable[[str, list[Candidate]], Sequence[float]] | CrossEncoder


class Reranking(NamedTuple):
    """A reranker, and the number of labels that it scores for each text."""

    reranker: Reranker
    top_k: int

    @classmethod
    def of(cls, reranker: Reranker | None, top_k: int | None) -> Reranking | None:
        """Return the checked arguments ``rerank`` and ``rerank_top_k``, or ``None`` if nothing is reranked.

        Raises:
            ValueError: if ``reranker`` cannot give one score per label, or ``top_k`` is wrong or has no effect.
        """
        if reranker is None:
            if top_k is not None:
                raise ValueError("`rerank_top_k` has an effect with `rerank` only: give both, or leave it out.")
            return None
        if isinstance(reranker, CrossEncoder):
            if reranker.num_labels != 1:
                raise ValueError(
                    f"`rerank` must give one score per pair, but this CrossEncoder gives {reranker.num_labels}. Give a "
                    "function that turns them into one."
                )
        elif not callable(reranker):
            raise ValueError(
                f"`rerank` must be a function (text, candidates) -> scores or a CrossEncoder, got "
                f"{type(reranker).__name__}."
            )
        return cls(reranker, RERANK_TOP_K if top_k is None else checked_k(top_k, "rerank_top_k"))

    def __str__(self) -> str:
        name = getattr(self.reranker, "__name__", type(self.reranker).__name__)
        return f"rerank={name}, rerank_top_k={self.top_k}"

    def check_top_k(self, top_k: int | None, num_labels: int) -> None:
        """Refuse to return more labels of a text than are reranked.

        Raises:
            ValueError: if ``top_k`` is above ``rerank_top_k``.
        """
        if top_k is not None and min(top_k, num_labels) > self.top_k:
            raise ValueError(
                f"`top_k` must be at most `rerank_top_k`, since only reranked labels are returned, got {top_k} and "
                f"{self.top_k}. Raise `rerank_top_k`."
            )

    def apply(self, texts: Sequence[str], found: TopK, labels: Dataset) -> TopK:
        """Return the same labels of each text in the order of the reranker's scores, with these scores.

        Labels of equal scores keep their order. A text without labels is not given to the reranker.

        Args:
            texts: ``N`` texts.
            found: ``(N, k)``, the best labels of each.
            labels: A row for each label, with columns ``uid`` and ``text``.

        Raises:
            ValueError: if the reranker does not return a finite number per candidate.
        """
        candidates = _candidates(found, labels)
        label_ids, scores = found.label_ids.copy(), found.scores.copy()
        for row, (text, new) in enumerate(zip(texts, self._scores(texts, candidates), strict=True)):
            size = len(candidates[row])
            if new.shape != (size,) or not np.isfinite(new).all():
                raise ValueError(
                    f"`rerank` must return a finite number for each of {size} candidates, got {new.tolist()!r:.200} "
                    f"for the text {text[:60]!r}."
                )
            order = np.argsort(-new, kind="stable")  # found labels stand before padding
            label_ids[row, :size], scores[row, :size] = label_ids[row, order], new[order]
        return TopK(label_ids, scores)

    def _scores(self, texts: Sequence[str], candidates: list[list[Candidate]]) -> list[np.ndarray]:
        if isinstance(self.reranker, CrossEncoder):
            pairs = [(text, label.text) for text, some in zip(texts, candidates, strict=True) for label in some]
            new = np.empty(0, np.float32)
            if pairs:
                new = np.asarray(self.reranker.predict(pairs, show_progress_bar=False), np.float32)
            return np.split(new, np.cumsum([len(some) for some in candidates])[:-1])
        return [
            _floats(self.reranker(text, list(some))) if some else np.empty(0)
            for text, some in zip(texts, candidates, strict=True)
        ]


def _floats(scores: Any) -> np.ndarray:
    """Return scores as float32; an array of no shape that fits if they are not numbers."""
    try:
        given: np.ndarray = np.asarray(scores, np.float32)
    except (TypeError, ValueError):
        given = np.empty(())
    return given if given.ndim else np.array(repr(scores), object)


def _candidates(found: TopK, labels: Dataset) -> list[list[Candidate]]:
    chosen = np.unique(found.label_ids[found.label_ids >= 0]).tolist()
    rows = labels[chosen]
    uids, texts = (dict(zip(chosen, rows[name], strict=True)) for name in ("uid", "text"))
    return [
        [Candidate(uids[label], texts[label], score) for label, score in zip(*row, strict=True) if label >= 0]
        for row in zip(found.label_ids.tolist(), found.scores.tolist(), strict=True)
    ]
