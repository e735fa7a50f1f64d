"""The forward pass of an encoder, as in its ``encode_*`` methods but with a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Features = dict[str, Any]  # output of an encoder's `preprocess`, and the ROLE of the texts
ROLE = "role"  # key of "query" or "document", which the encoder does not read


def embed(encoder: nn.Module, features: Features) -> Tensor:
    """Return the ``(rows, D)`` embeddings of preprocessed texts, with a gradient.

    They are those of ``encode_query`` or ``encode_document``: the task is passed on, and ``truncate_dim`` is applied.
    """
    inputs = dict(features)  # modules modify their input dict
    role = inputs.pop(ROLE, None)
    output = encoder(inputs) if role is None else encoder(inputs, task=role)
    embeddings: Tensor = output["sentence_embedding"]
    return embeddings[:, : getattr(_unwrapped(encoder), "truncate_dim", None)]


def forget_autocast(encoder: nn.Module) -> dict[str, Any]:
    """Make an encoder embed in the precision of its weights again, and return the removed ``forward``.

    Accelerate gives a model in mixed precision a ``forward`` with autocast, and leaves it there after training. A
    loaded encoder has no such ``forward``, so its embeddings would differ from label embeddings computed with autocast.
    """
    return {name: vars(encoder).pop(name) for name in ("forward", "_original_forward") if name in vars(encoder)}


@contextmanager
def without_autocast(encoder: nn.Module) -> Iterator[None]:
    """Embed in the precision of the weights, even during a run in mixed precision."""
    taken = forget_autocast(encoder)
    try:
        yield
    finally:
        vars(encoder).update(taken)


def _unwrapped(encoder: nn.Module) -> Any:
    return getattr(encoder, "module", encoder)  # DistributedDataParallel
