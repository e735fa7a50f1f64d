"""Settings of the votes of a memory, and the values that tuning tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GRID: dict[str, Sequence[Any]] = {
    "neighbors": (10, 20, 30, 50),
    "mix": (0.03, 0.1, 0.2, 0.4, 0.7, 0.9),
    "temperature": (0.02, 0.03, 0.05, 0.1),
    "label_temperature": (1, 2, 3, 5, 8),
    "discount": (0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2),
    "first_discount": (-0.01, 0),  # a positive one, chosen on few queries, can cost four points of P@1
}
COMBINED: dict[str, Sequence[Any]] = {  # of these, all combinations are tried with all discounts
    "neighbors": (10, 50),
    "temperature": (0.03, 0.05, 0.1),
    "mix": (0.1, 0.2, 0.4, 0.7, 0.9),
    "label_temperature": (2, 5, 8),
}
SURE = 1000  # queries on which tuning may spend the whole tolerance
METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10")


@dataclass(frozen=True)
class MemorySettings:
    """Settings of votes, and of their mix with the label scores. :meth:`TrainingMemory.tune` chooses them.

    Attributes:
        neighbors: Number of training queries that vote.
        temperature: Temperature of the softmax over their cosines, which gives the weights of the votes.
        label_temperature: Temperature of the softmax over the label scores.
        mix: Weight of the votes, from 0 (only the label scores count) to 1 (only the votes count).
        discount: Exponent of the training frequency of a label, by which its mixed score is divided. A larger exponent
            favors rare labels.
        first_discount: The discount with which the first label is chosen, if it is smaller. Neighbors often agree on
            several labels. A negative discount then chooses the most frequent of them, which is the safest.
        candidates: Number of best labels in that softmax. Further labels take part only if they get a vote. Fewer are
            faster to find with an approximate index. :meth:`TrainingMemory.tune` keeps this number.

    Raises:
        ValueError: if a setting is out of range.
    """

    neighbors: int = 50
    temperature: float = 0.1
    label_temperature: float = 8.0
    mix: float = 0.7
    discount: float = 0.0
    first_discount: float = -0.01
    candidates: int = 200

    def __post_init__(self) -> None:
        ranges = {"neighbors": (1, np.inf), "candidates": (1, np.inf), "mix": (0, 1), "discount": (0, np.inf)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must be a number from {low} to {high}, got {getattr(self, name)}.")
        for name in ("temperature", "label_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if np.isnan(self.first_discount):
            raise ValueError("`first_discount` must be a number, got nan.")

    @property
    def discount_of_first(self) -> float:
        """The discount of the first label: a larger one than that of the others could put it behind them."""
        return min(self.discount, self.first_discount)
