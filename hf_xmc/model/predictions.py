"""Predictions as users read them: uids and texts instead of label ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from datasets import Dataset

from hf_xmc.topk import TopK


class Prediction(NamedTuple):
    """One label of a text."""

    uid: str
    text: str
    score: float


def predictions_of(found: TopK, labels: Dataset, threshold: float | None = None) -> list[list[Prediction]]:
    """Return the labels found for each query, best first, without labels that score below a threshold.

    Args:
        found: The best labels of each query, as rows of ``labels``.
        labels: A data set with columns ``uid`` and ``text``.
        threshold: Minimum score of a label.
    """
    chosen = np.unique(found.label_ids)
    chosen = chosen[chosen >= 0]
    rows = labels[chosen.tolist()]  # `select` would take longer than the search
    place = {label: number for number, label in enumerate(chosen.tolist())}
    return [
        [
            Prediction(rows["uid"][place[label]], rows["text"][place[label]], score)
            for label, score in zip(label_ids, scores, strict=True)
            if label >= 0 and (threshold is None or score >= threshold)
        ]
        for label_ids, scores in zip(*(part.tolist() for part in found), strict=True)
    ]
