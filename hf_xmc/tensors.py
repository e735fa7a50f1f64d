"""Unit norms, and checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def unit_rows(embeddings: np.ndarray | Tensor) -> Tensor:
    """Return the rows of ``(N, D)`` embeddings scaled to unit norm.

    A row whose norm is 1 up to the rounding of half precision is returned unchanged, so that saved rows are restored
    bit for bit.
    """
    embeddings = torch.as_tensor(embeddings).detach()
    length = embeddings.float().norm(dim=1, keepdim=True)
    off = ~((length - 1).abs() < 1e-3)[:, 0]  # NaN is off
    if not off.any():
        return embeddings
    scaled = (embeddings[off].float() / length[off].clamp(min=1e-12)).to(embeddings.dtype)
    return embeddings.index_put((off,), scaled)


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, with one reduction per tensor."""
    for name, x in named:
        # A finite sum proves finite entries without a tensor of booleans. A sum may overflow, so check again.
        if not bool(x.detach().sum().isfinite()) and not bool(x.isfinite().all()):
            return name
    return None


def check_finite(named: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise ``FloatingPointError`` if one of the tensors holds a NaN or an infinity."""
    if name := first_non_finite(named):
        raise FloatingPointError(
            f"{what} are not finite: {name} holds NaN or infinity, so they are not saved. The training has diverged: "
            "resume from the previous checkpoint with a lower learning rate."
        )
