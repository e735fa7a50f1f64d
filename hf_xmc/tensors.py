"""Unit norms and checks for NaN and infinity, for tensors of every package."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def unit(embeddings: np.ndarray | Tensor) -> Tensor:
    """Return the rows of ``(N, D)`` embeddings scaled to unit norm.

    A row whose norm is 1 up to the rounding of half precision is returned as it is, so that saved rows come back bit
    for bit.
    """
    embeddings = torch.as_tensor(embeddings).detach()
    length = embeddings.float().norm(dim=1, keepdim=True)
    there = (embeddings.float() / length.clamp(min=1e-12)).to(embeddings.dtype)
    return torch.where((length - 1).abs() < 1e-3, embeddings, there)


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, with one reduction per tensor."""
    for name, x in named:
        # A sum is finite only if all are, and takes no table of booleans; one that overflows is looked at again.
        if not bool(x.detach().sum().isfinite()) and not bool(x.isfinite().all()):
            return name
    return None


def refuse_non_finite(named: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise ``FloatingPointError`` if one of the tensors holds a NaN or an infinity."""
    if name := first_non_finite(named):
        raise FloatingPointError(
            f"{what} are not finite: {name} holds NaN or infinity, so they are not saved. The training has diverged: "
            "resume from the checkpoint before, with a lower learning rate."
        )
