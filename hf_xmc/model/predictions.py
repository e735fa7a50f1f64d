"""Predictions as users read them: label texts instead of row numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from datasets import Dataset

from hf_xmc.topk import TopK


class Prediction(NamedTuple):
    """One label of a text."""

    label_id: str
    text: str
    score: float


def predictions_of(found: TopK, labels: Dataset, threshold: float | None = None) -> list[list[Prediction]]:
    """The labels that were found for each query, best first, without those that score below a threshold.

    Args:
        found: rows of ``labels``.
        labels: columns ``label_id`` and ``text``.
    """
    chosen = np.unique(found.label_ids)
    chosen = chosen[chosen >= 0]
    rows = labels[chosen.tolist()]  # `select` would take longer than the search
    place = {label: number for number, label in enumerate(chosen.tolist())}
    return [
        [
            Prediction(rows["label_id"][place[label]], rows["text"][place[label]], score)
            for label, score in zip(label_ids, scores, strict=True)
            if label >= 0 and (threshold is None or score >= threshold)
        ]
        for label_ids, scores in zip(*(part.tolist() for part in found), strict=True)
    ]
