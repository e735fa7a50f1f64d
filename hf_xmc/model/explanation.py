"""Why a label is predicted: its score in parts, and the training queries that speak for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_xmc.metrics.calibration import Calibration
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.memory import CANDIDATES, TrainingMemory, probabilities
from hf_xmc.topk import TopK


class Remembered(NamedTuple):
    """A training query that carries the label."""

    text: str | None  # None where the memory keeps no texts
    similarity: float  # cosine with the text that is explained
    weight: float  # its share of the votes, 0 where it is not among the nearest


class Explanation(NamedTuple):
    """One label of one text. Without a memory, the score is the label score, and ``share`` to ``penalty`` are ``None``.

    With one, the score before calibration is ``log((1 - mix) * share + mix * vote) - penalty``, see
    :class:`hf_xmc.TrainingMemory`.
    """

    label_id: str
    text: str
    seen: bool | None  # whether the label was in the training; None where that is not known
    score: float  # as predicted: a probability where the model is calibrated
    raw_score: float  # the same before calibration
    label_score: float  # dot product with the best of the label's texts
    share: float | None  # of the label in the softmax over the best labels
    vote: float | None  # share of the votes that it gets
    mix: float | None
    penalty: float | None  # for being frequent
    nearest: tuple[Remembered, ...]  # training queries with the label, most similar first

    def __str__(self) -> str:
        seen = {True: "seen in training", False: "not seen in training", None: "not known whether seen in training"}
        lines = [f"{self.score:.3f}  {self.text}  ({self.label_id}, {seen[self.seen]})"]
        if self.vote is None:
            lines.append(f"  label score {self.label_score:.3f}")
        else:
            own = 1 - (self.mix or 0.0)
            lines.append(
                f"  labels count {own:.0%}: {self.share:.1%} of the best, by a score of {self.label_score:.3f}"
            )
            lines.append(
                f"  memory counts {self.mix:.0%}: {self.vote:.1%} of the votes; frequency takes {self.penalty:.3f}"
            )
        for known in self.nearest:
            vote = f"  ({known.weight:.1%} of the votes)" if known.weight else ""
            lines.append(f"  {known.similarity:.3f}  {known.text}{vote}")
        return "\n".join(lines)


def explain(
    query: Tensor,
    label: int,
    about: dict[str, Any],
    index: LabelIndex,
    memory: TrainingMemory | None,
    calibration: Calibration | None,
    num_nearest: int,
) -> Explanation:
    """Explain the score of a label for one query ``(1, D)``; ``about`` is the label's row."""
    label_score = raw = float(index.search(query, 1, allow=[label]).scores[0, 0])
    parts: dict[str, Any] = dict.fromkeys(("share", "vote", "mix", "penalty"))
    nearest: list[Remembered] = []
    if memory is not None:
        raw, parts = _parts(memory, query, label, label_score, index)
        nearest = _carriers(memory, query, label, num_nearest)
    score = raw
    if calibration is not None:
        k = calibration.first or 1  # labels after the first ones of a text have another map
        first = index.search(query, k) if memory is None else memory.search(query, k, index)
        place = 0 if label in first.label_ids else k
        score = float(calibration(np.full((1, place + 1), raw))[0, place])
    names = about["label_id"], about["text"], about.get("seen")
    return Explanation(*names, score, raw, label_score, **parts, nearest=tuple(nearest))


def _parts(
    memory: TrainingMemory, query: Tensor, label: int, label_score: float, index: LabelIndex
) -> tuple[float, dict[str, float]]:
    """The score that the memory's search gives a label, and what it is made of.

    A label that is neither among the best nor voted for scores as in a search for so many that it is found.
    """
    settings, found = memory.settings, index.search(query, CANDIDATES)
    vote = float(memory.votes(memory.nearest(query), settings)[0, label])
    if not vote and label not in found.label_ids:
        found = TopK(np.append(found.label_ids, [[label]], 1), np.append(found.scores, [[label_score]], 1))
    share = float(probabilities(found, settings.label_temperature, memory.num_labels)[0, label])
    penalty = settings.discount * float(np.log1p(memory.relevance[:, [label]].sum()))
    mixed = (1 - settings.mix) * share + settings.mix * vote
    score = float(np.log(mixed)) - penalty if mixed else -np.inf
    return score, {"share": share, "vote": vote, "mix": settings.mix, "penalty": penalty}


def _carriers(memory: TrainingMemory, query: Tensor, label: int, n: int) -> list[Remembered]:
    """The ``n`` nearest training queries that have a label."""
    carry = memory.relevance.tocsc()[:, [label]].indices
    rows, cosines = memory.index.search(torch.nn.functional.normalize(query.float()), n, allow=carry)
    nearest = memory.nearest(query)
    weight = dict(zip(nearest.rows[0].tolist(), memory.weights(nearest, memory.settings)[0].tolist(), strict=True))
    return [
        Remembered(None if memory.texts is None else memory.texts[row], cosine, weight.get(row, 0.0))
        for row, cosine in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)
        if row >= 0
    ]
