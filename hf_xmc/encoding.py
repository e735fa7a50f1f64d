"""Embedding texts with a gradient, at a memory of one chunk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Features = dict[str, Any]  # the keyword tensors that an encoder's `preprocess` makes of texts


def embed(encoder: nn.Module, features: Features) -> Tensor:
    """``(rows, D)`` embeddings of preprocessed texts, differentiable."""
    embeddings: Tensor = encoder(dict(features))["sentence_embedding"]  # modules write into the dict they are given
    return embeddings


def embed_in_chunks(encoder: nn.Module, chunks: Iterable[Features]) -> Tensor:
    """Embed every chunk, keeping no activations: autograd embeds a chunk again when its gradient arrives.

    Costs a second forward pass; memory stays at one chunk however many there are. This is gradient caching (Gao et
    al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021). A single chunk has nothing to
    save and is embedded once.
    """
    chunks = list(chunks)
    if len(chunks) == 1:
        return embed(encoder, chunks[0])
    # Non-reentrant checkpointing replays the random state, so dropout draws the same mask both times.
    return torch.cat([checkpoint(embed, encoder, chunk, use_reentrant=False) for chunk in chunks])
