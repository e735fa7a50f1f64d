"""Settings of the streamed losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_xmc.distributed import LabelShard

MEMORY_BUDGET = 256 * 2**20
ENGINES = ("auto", "torch", "triton")


@dataclass(frozen=True)
class StreamingOptions:
    """The layout of the labels of a streamed loss, and its memory, precision and engine.

    Args:
        shard: The range of labels that this process holds; ``None`` if it holds all of them.
        text_counts: ``(L,)`` number of texts of each label; ``None`` if every label has one text.
        memory_budget: Memory for scores, in bytes.
        score_dtype: Precision of the matrix product for the scores: ``torch.bfloat16``, or ``None`` for float32.
            All values computed from the scores stay in float32.
        gradient_dtype: Precision of the matrix products for the gradients: ``torch.bfloat16``, or ``None`` for the
            precision of the scores.
        engine: ``"torch"``, ``"triton"``, or ``"auto"`` for Triton on a GPU if it is installed.

    Raises:
        ValueError: if ``memory_budget``, ``score_dtype``, ``gradient_dtype`` or ``engine`` is invalid.
    """

    shard: LabelShard | None = None
    text_counts: Tensor | None = None
    memory_budget: int = MEMORY_BUDGET
    score_dtype: torch.dtype | None = None
    gradient_dtype: torch.dtype | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.memory_budget < 1:
            raise ValueError(f"`memory_budget` must be a number of bytes above 0, got {self.memory_budget}.")
        for name in ("score_dtype", "gradient_dtype"):
            if getattr(self, name) not in (None, torch.bfloat16):
                raise ValueError(f"`{name}` must be None or torch.bfloat16, got {getattr(self, name)}.")
        if self.engine not in ENGINES:
            raise ValueError(f'`engine` must be "auto", "torch" or "triton", got {self.engine!r}.')
        if self.engine == "triton" and self.score_dtype is not None:
            raise ValueError(f'`score_dtype` must be None with engine="triton", got {self.score_dtype}. Use "torch".')
