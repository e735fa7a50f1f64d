"""How the votes of a memory count, and the values that tuning tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GRID: dict[str, Sequence[Any]] = {
    "neighbors": (10, 20, 30, 50),
    "mix": (0.03, 0.1, 0.2, 0.4, 0.7, 0.9),
    "temperature": (0.02, 0.03, 0.05, 0.1),
    "label_temperature": (1, 2, 3, 5),
    "discount": (0, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2),
}
METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10")


@dataclass(frozen=True)
class MemorySettings:
    """How votes are counted and mixed with the label scores; :meth:`TrainingMemory.tune` chooses all of it.

    Attributes:
        neighbors: training queries that vote.
        temperature: of the softmax over their cosines, which weighs the votes.
        label_temperature: of the softmax over the label scores.
        mix: share of the votes; 0 asks the labels alone, 1 the memory alone.
        discount: exponent of a label's training frequency that the mixed score is divided by. Rare labels gain.
    """

    neighbors: int = 20
    temperature: float = 0.05
    label_temperature: float = 2.0
    mix: float = 0.2
    discount: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (("neighbors", 1, np.inf), ("mix", 0, 1), ("discount", 0, np.inf)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is a number from {low} to {high}, got {getattr(self, name)}.")
        for name in ("temperature", "label_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
