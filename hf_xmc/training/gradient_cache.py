"""Embedding texts with a gradient, at a memory of one chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_xmc.encoders.forward import Features, embed
from hf_xmc.training.sampling import inclusion_probabilities, systematic_sample


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


def embed_sampled(
    encoder: nn.Module,
    parameters: Sequence[Tensor],
    chunks: Sequence[Features],
    chunks_of: Callable[[Tensor], Iterable[tuple[slice, Features]]],
    share: float,
    normalised: bool,
) -> Tensor:
    r"""Embed every chunk without a gradient; when it arrives, embed again a sample of the rows that stands for all.

    With :math:`g_l` the gradient at row :math:`l`, a row is drawn with probability :math:`\pi_l = \min(1, c \lVert g_l
    \rVert)` and its gradient counts :math:`1 / \pi_l` times: the gradient of every parameter is unbiased. To embed all
    rows forward and ``share`` of them forward and backward costs about ``1 + 3 share`` forward passes, where
    :func:`embed_in_chunks` costs 4. Dropout draws new masks the second time.

    Args:
        encoder: what embeds.
        parameters: those of its parameters that get a gradient, see :func:`parameters_reached`.
        chunks: the features of all rows, in order.
        chunks_of: gives the features of some rows, chunk by chunk, with the part of them that a chunk is.
        share: of the rows, in (0, 1].
        normalised: whether embeddings have length 1; then only the gradient across them counts.
    """
    embeddings: Tensor = _EmbedSampled.apply(encoder, chunks, chunks_of, share, normalised, *parameters)
    return embeddings


def trainable(encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def parameters_reached(encoder: nn.Module, features: Features) -> list[Tensor]:
    """Return the parameters that receive a gradient from an embedding; an unused pooler, for example, does not."""
    parameters = trainable(encoder)
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()  # a layer that is left out now and then is reached, and what dropout draws later does not change
    try:
        with torch.enable_grad():
            embedding = embed(encoder, features).sum()
        if not embedding.requires_grad:  # all of them are frozen
            return []
        found = torch.autograd.grad(embedding, parameters, allow_unused=True)
    finally:
        for module in training:
            module.training = True
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]


def name_parameters(parameters: Sequence[Tensor], encoder: nn.Module, inputs: Any, output: dict[str, Any]) -> None:
    """A forward hook that names, in an entry of the output that nobody reads, the parameters that labels will reach.

    DistributedDataParallel sees only queries pass. It looks in their output for what is in use, and would take a tower
    that only labels pass for unused.
    """
    if torch.is_grad_enabled() and parameters:
        output["parameters_of_labels"] = torch.stack([parameter.flatten()[0] for parameter in parameters])


class _EmbedSampled(torch.autograd.Function):
    # The parameters are inputs, so that their gradients leave by the outer graph: DistributedDataParallel sees each
    # parameter ready once, the queries' share included. One that gets no gradient would be seen ready all the same.

    @staticmethod
    def forward(
        ctx: Any,
        encoder: nn.Module,
        chunks: Sequence[Features],
        chunks_of: Callable[[Tensor], Iterable[tuple[slice, Features]]],
        share: float,
        normalised: bool,
        *parameters: Tensor,
    ) -> Tensor:
        embeddings = torch.cat([embed(encoder, chunk) for chunk in chunks])
        ctx.encoder, ctx.chunks_of, ctx.share, ctx.parameters = encoder, chunks_of, share, parameters
        ctx.save_for_backward(*([embeddings] if normalised else []))
        return embeddings

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        importance = gradient_norms(grad, *ctx.saved_tensors)
        probabilities = inclusion_probabilities(importance, math.ceil(ctx.share * len(grad)))
        drawn = systematic_sample(probabilities)
        grad = grad[drawn] / probabilities[drawn, None].to(grad.dtype)
        totals: list[Tensor | None] = [None] * len(ctx.parameters)
        for part, features in ctx.chunks_of(drawn):
            with torch.enable_grad():
                embeddings = embed(ctx.encoder, features)
            found = torch.autograd.grad(embeddings, ctx.parameters, grad[part].to(embeddings.dtype), allow_unused=True)
            totals = [a if b is None else b if a is None else a.add_(b) for a, b in zip(totals, found, strict=True)]
        return None, None, None, None, None, *totals


def gradient_norms(grad: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """``(L,)`` lengths of the rows' gradients ``(L, D)``; with ``embeddings`` of length 1, of their part across them.

    What lies along an embedding of fixed length never reaches a parameter.
    """
    grad = grad.float()
    if embeddings is not None:
        embeddings = embeddings.float()
        grad = grad - (grad * embeddings).sum(1, keepdim=True) * embeddings
    return grad.norm(dim=1)
