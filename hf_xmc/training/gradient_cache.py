"""Embed texts with a gradient, in the memory of one chunk."""

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
    """Embed every chunk without keeping activations. Autograd embeds a chunk again when its gradient arrives.

    This costs a second forward pass, and the memory of one chunk for any number of chunks. It is gradient caching (Gao
    et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021). A single chunk saves no
    memory, so it is embedded once.
    """
    chunks = list(chunks)
    if len(chunks) == 1:
        return embed(encoder, chunks[0])
    # Non-reentrant checkpointing restores the random state, so dropout draws the same mask both times.
    return torch.cat([checkpoint(embed, encoder, chunk, use_reentrant=False) for chunk in chunks])


def embed_sampled(
    encoder: nn.Module,
    parameters: Sequence[Tensor],
    chunks: Sequence[Features],
    chunks_of: Callable[[Tensor], Iterable[tuple[slice, Features]]],
    fraction: float,
    normalised: bool,
) -> Tensor:
    r"""Embed every chunk without a gradient, and embed a sample of the rows again when the gradient arrives.

    Let :math:`g_l` be the gradient at row :math:`l`. The row is drawn with probability :math:`\pi_l = \min(1, c \lVert
    g_l \rVert)`, and its gradient is multiplied by :math:`1 / \pi_l`, so the gradient of every parameter is unbiased.
    A forward pass over all rows and a forward and backward pass over a fraction of them cost about ``1 + 3 * fraction``
    forward passes; :func:`embed_in_chunks` costs 4. Dropout draws new masks in the second pass.

    Args:
        encoder: The encoder.
        parameters: The parameters of the encoder that receive a gradient, see :func:`parameters_reached`.
        chunks: Features of all rows, in order.
        chunks_of: A function that yields the features of given rows in chunks, each with its slice of the rows.
        fraction: Fraction of the rows that is embedded again, in (0, 1].
        normalised: Whether embeddings have unit norm. Then only the gradient orthogonal to them counts.
    """
    embeddings: Tensor = _EmbedSampled.apply(encoder, chunks, chunks_of, fraction, normalised, *parameters)
    return embeddings


def trainable(encoder: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def parameters_reached(encoder: nn.Module, features: Features) -> list[Tensor]:
    """Return the parameters that receive a gradient from an embedding; an unused pooler, for example, does not."""
    parameters = trainable(encoder)
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()  # LayerDrop must not hide a parameter, and the random state must not advance
    try:
        with torch.enable_grad():
            embedding = embed(encoder, features).sum()
        if not embedding.requires_grad:  # all parameters are frozen
            return []
        found = torch.autograd.grad(embedding, parameters, allow_unused=True)
    finally:
        for module in training:
            module.training = True
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]


def name_parameters(parameters: Sequence[Tensor], encoder: nn.Module, inputs: Any, output: dict[str, Any]) -> None:
    """Put the label parameters into the output, as a forward hook, so that DDP does not mark them as unused.

    DistributedDataParallel sees only the forward pass of queries. It searches its output for the parameters in use, and
    would miss a tower that only labels pass through. Nothing reads the added entry.
    """
    if torch.is_grad_enabled() and parameters:
        output["parameters_of_labels"] = torch.stack([parameter.flatten()[0] for parameter in parameters])


class _EmbedSampled(torch.autograd.Function):
    # The parameters are inputs, so that their gradients flow through the outer graph. DistributedDataParallel then sees
    # each parameter ready once, with the gradient of the queries included. It would also see a parameter without a
    # gradient as ready, so only the parameters that are reached are passed.

    @staticmethod
    def forward(
        ctx: Any,
        encoder: nn.Module,
        chunks: Sequence[Features],
        chunks_of: Callable[[Tensor], Iterable[tuple[slice, Features]]],
        fraction: float,
        normalised: bool,
        *parameters: Tensor,
    ) -> Tensor:
        embeddings = torch.cat([embed(encoder, chunk) for chunk in chunks])
        ctx.encoder, ctx.chunks_of, ctx.fraction, ctx.parameters = encoder, chunks_of, fraction, parameters
        ctx.save_for_backward(*([embeddings] if normalised else []))
        return embeddings

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        importance = gradient_norms(grad, *ctx.saved_tensors)
        probabilities = inclusion_probabilities(importance, math.ceil(ctx.fraction * len(grad)))
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
    """Return the norms ``(L,)`` of the rows of a gradient ``(L, D)``.

    With ``embeddings`` of unit norm, return the norms of the part orthogonal to them: the part along an embedding of
    fixed norm never reaches a parameter.
    """
    grad = grad.float()
    if embeddings is not None:
        embeddings = embeddings.float()
        grad = grad - (grad * embeddings).sum(1, keepdim=True) * embeddings
    return grad.norm(dim=1)
