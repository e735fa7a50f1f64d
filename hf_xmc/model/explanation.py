"""Explain a prediction: the score of a label in parts, and the remembered queries that have the label."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_xmc.metrics.calibration import Calibration
from hf_xmc.model.word_weights import WordWeight, WordWeights
from hf_xmc.search.contract import LabelSearch
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.mixing import probabilities, votes_of
from hf_xmc.topk import TopK

SHOWN_WORDS = 8  # words in a printed explanation


class Remembered(NamedTuple):
    """A training query that has the label."""

    text: str | None  # None if the memory keeps no texts
    similarity: float  # cosine with the text that is explained
    weight: float  # its fraction of the votes, 0 if it is not among the nearest


class Explanation(NamedTuple):
    """The score of one label for one text, in parts.

    Without a memory, the score is the label score, and ``weight`` to ``penalty`` are ``None``. With one, the score
    before calibration is ``log((1 - mix) * weight + mix * vote) - penalty``, see :class:`hf_xmc.TrainingMemory`. The
    penalty of the first label may be negative, see :class:`hf_xmc.MemorySettings`.
    """

    uid: str
    text: str
    seen: bool | None  # whether the label was in the training; None if that is not known
    score: float  # as predicted: a probability if the model is calibrated
    raw_score: float  # the score before calibration
    label_score: float  # dot product with the best of the label's texts
    weight: float | None  # of the label in the softmax over the best labels
    vote: float | None  # fraction of the votes that it gets
    mix: float | None  # weight of the votes against the label scores
    penalty: float | None  # discount of a frequent label; it may be negative for the first label
    nearest: tuple[Remembered, ...]  # training queries with the label, most similar first
    words: tuple[WordWeight, ...] = ()  # what each word of the text adds to `label_score`, in their order
    words_add_up: bool = False  # true of a static encoder: the weights of the words add up to `label_score`
    vector_score: float | None = None  # the part of `label_score` from the label's own vector; the rest is by its text
    new: bool = False  # a new label, whose `raw_score` is the one of :mod:`hf_xmc.search.new_labels`

    def __str__(self) -> str:
        seen = {True: "seen in training", False: "not seen in training", None: "not known whether seen in training"}
        lines = [f"{self.score:.3f}  {self.text}  ({self.uid}, {seen[self.seen]})"]
        if self.new:
            lines.append(f"  new label: cosine and shared words score {self.raw_score:.3f}")
        if self.vote is None:
            lines.append(f"  label score {self.label_score:.3f}")
        else:
            own = 1 - (self.mix or 0.0)
            lines.append(
                f"  labels count {own:.0%}: {self.weight:.1%} of the best, by a score of {self.label_score:.3f}"
            )
        if self.vector_score is not None:
            rest = self.label_score - self.vector_score
            lines.append(f"  of that score, {self.vector_score:+.3f} by the label itself, {rest:+.3f} by its text")
        if self.vote is not None:
            penalty = self.penalty or 0.0
            frequency = f"frequency takes {penalty:.3f}" if penalty >= 0 else f"frequency adds {-penalty:.3f}"
            lines.append(f"  memory counts {self.mix:.0%}: {self.vote:.1%} of the votes; {frequency}")
        for known in self.nearest:
            vote = f"  ({known.weight:.1%} of the votes)" if known.weight else ""
            lines.append(f"  {known.similarity:.3f}  {known.text}{vote}")
        return "\n".join(lines + self._lines_of_words())

    def _lines_of_words(self) -> list[str]:
        """Return the words of the largest weights, and the sum of the others."""
        if not self.words:
            return []
        ranked = sorted(self.words, key=lambda word: -abs(word.weight))
        title = "add up to the label score" if self.words_add_up else "score lost without each; they do not add up"
        lines = [f"  words ({title}):"]
        lines += [f"    {word.weight:+.3f}  {word.text}" for word in ranked[:SHOWN_WORDS]]
        rest = ranked[SHOWN_WORDS:]
        if rest and self.words_add_up:
            lines.append(f"    {sum(word.weight for word in rest):+.3f}  {len(rest)} more")
        return lines


def explain(
    query: Tensor,
    label: int,
    about: dict[str, Any],
    index: LabelSearch,
    memory: TrainingMemory | None,
    calibration: Calibration | None,
    num_nearest: int,
    words: WordWeights,
    vector_score: float | None = None,
    deny: np.ndarray | None = None,
) -> Explanation:
    """Explain the score of a label for one query ``(1, D)``.

    ``about`` is the label's row, and ``vector_score`` the part of its score from its own vector, if it has one. The
    label does not compete with those of ``deny``.
    """
    label_score = raw = float(index.search(query, 1, allow=[label]).scores[0, 0])
    parts: dict[str, Any] = dict.fromkeys(("weight", "vote", "mix", "penalty"))
    nearest: list[Remembered] = []
    if memory is not None:
        raw, parts = _parts(memory, query, label, label_score, index, deny)
        nearest = _carriers(memory, query, label, num_nearest) if num_nearest else []
    score = raw
    if calibration is not None:
        k = calibration.first or 1  # labels after the first ones of a text have another map
        first = index.search(query, k, deny=deny) if memory is None else memory.search(query, k, index, deny=deny)
        place = 0 if label in first.label_ids else k
        score = float(calibration(np.full((1, place + 1), raw))[0, place])
    return Explanation(
        uid=about["uid"],
        text=about["text"],
        seen=about.get("seen"),
        score=score,
        raw_score=raw,
        label_score=label_score,
        **parts,
        nearest=tuple(nearest),
        words=words.words,
        words_add_up=words.exact,
        vector_score=vector_score,
    )


def _parts(
    memory: TrainingMemory, query: Tensor, label: int, label_score: float, index: LabelSearch, deny: np.ndarray | None
) -> tuple[float, dict[str, float]]:
    """Return the score of a label in a search with the memory, and its parts.

    A label that is neither among the best nor voted for gets the score of a search that is deep enough to find it.
    """
    settings, nearest = memory.settings, memory.nearest(query)
    found = index.search(query, settings.candidates, deny=deny)
    votes = votes_of(nearest.rows, memory.weights(nearest, settings), memory.relevance)
    vote = float(votes.weights[votes.label_ids == label].sum())
    if not vote and label not in found.label_ids:
        found = TopK(np.append(found.label_ids, [[label]], 1), np.append(found.scores, [[label_score]], 1))
    own = probabilities(found, settings.label_temperature, settings.candidates)
    weight = float(own[found.label_ids == label].sum())
    frequency = float(np.log1p(memory.relevance[:, [label]].sum()))
    mixed = (1 - settings.mix) * weight + settings.mix * vote
    log_mixed = float(np.log(mixed)) if mixed else -np.inf
    first = float(memory.search(query, 1, index, deny=deny).scores[0, 0])
    penalty = settings.discount_of_first * frequency
    if not np.isclose(log_mixed - penalty, first, rtol=1e-6, atol=1e-6):
        penalty = settings.discount * frequency
    return log_mixed - penalty, {"weight": weight, "vote": vote, "mix": settings.mix, "penalty": penalty}


def _carriers(memory: TrainingMemory, query: Tensor, label: int, n: int) -> list[Remembered]:
    """Return the ``n`` nearest training queries that have a label."""
    carry = memory.relevance.tocsc()[:, [label]].indices
    rows, cosines = memory.index.search(torch.nn.functional.normalize(query.float()), n, allow=carry)
    nearest = memory.nearest(query)
    weight = dict(zip(nearest.rows[0].tolist(), memory.weights(nearest, memory.settings)[0].tolist(), strict=True))
    return [
        Remembered(None if memory.texts is None else memory.texts[row], cosine, weight.get(row, 0.0))
        for row, cosine in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)
        if row >= 0
    ]
