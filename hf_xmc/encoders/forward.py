"""The forward pass of an encoder, as its ``encode_*`` methods make it, with a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Features = dict[str, Any]  # what an encoder's `preprocess` returns for texts, and their ROLE
ROLE = "role"  # key of the features that is not for the encoder: "query" or "document"


def embed(encoder: nn.Module, features: Features) -> Tensor:
    """Return the ``(rows, D)`` embeddings of preprocessed texts, with a gradient.

    They are those of ``encode_query`` or ``encode_document``: the task is passed on, and ``truncate_dim`` is applied.
    """
    inputs = dict(features)  # modules write into the dict that they are given
    role = inputs.pop(ROLE, None)
    output = encoder(inputs) if role is None else encoder(inputs, task=role)
    embeddings: Tensor = output["sentence_embedding"]
    return embeddings[:, : getattr(_unwrapped(encoder), "truncate_dim", None)]


def forget_autocast(encoder: nn.Module) -> dict[str, Any]:
    """Let an encoder embed in the precision of its weights again, and return what has been taken off.

    Accelerate puts a method ``forward`` with autocast into a model that trains in mixed precision, and leaves it there.
    A loaded encoder has none, so label embeddings that were made with it would not be those of the saved encoder.
    """
    return {name: vars(encoder).pop(name) for name in ("forward", "_original_forward") if name in vars(encoder)}


@contextmanager
def without_autocast(encoder: nn.Module) -> Iterator[None]:
    """Embed in the precision of the weights, also while a run in mixed precision goes on."""
    taken = forget_autocast(encoder)
    try:
        yield
    finally:
        vars(encoder).update(taken)


def _unwrapped(encoder: nn.Module) -> Any:
    return getattr(encoder, "module", encoder)  # DistributedDataParallel
