"""Embed queries and labels for prediction, so that their dot product is the similarity of the encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.encoders.phrases import averages_phrases, embed_phrases
from hf_xmc.encoders.roles import encode, normalises, prompt_of
from hf_xmc.tensors import unit_rows


def encode_queries(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Tensor:
    """Return the ``(N, D)`` embeddings of ``encode_query``, of unit norm if the encoder compares by the cosine.

    They are float16 if the encoder is, and float32 otherwise, because an index has no bfloat16.

    Raises:
        ValueError: if the encoder compares by a distance, or if it cannot embed queries.
    """
    by_cosine = compares_by_cosine(encoder)
    return comparable(_embed(encoder, texts, "query", batch_size), by_cosine)


def encode_labels(
    encoder: SentenceTransformer, texts: Sequence[str], batch_size: int, vectors: Tensor | None = None
) -> Tensor:
    """Return the ``(T, D)`` embeddings of ``encode_document``, scaled as by :func:`encode_queries`.

    Args:
        encoder: The encoder.
        texts: ``T`` texts of labels.
        batch_size: Number of texts to embed at a time.
        vectors: ``(T, D)``, the vector of each text's label, which is added before scaling; ``None`` for none. The sum
            has unit norm if the encoder normalises its embeddings, as in training.
    """
    by_cosine = compares_by_cosine(encoder)
    embeddings = _embed(encoder, texts, "document", batch_size)
    if vectors is None:
        return comparable(embeddings, by_cosine)
    return comparable(embeddings.float() + vectors.to(embeddings.device), by_cosine or normalises(encoder))


def _embed(encoder: SentenceTransformer, texts: Sequence[str], role: str, batch_size: int) -> Tensor:
    if type(encoder) is SentenceTransformer and encoder.truncate_dim is None and averages_phrases(encoder):
        return embed_phrases(encoder, list(texts), batch_size, prompt_of(encoder, role))
    return encode(encoder, list(texts), role, batch_size)


def comparable(embeddings: Tensor, by_cosine: bool) -> Tensor:
    """Return embeddings ``(N, D)`` in float16 or float32, and with unit norm if they are compared by the cosine."""
    embeddings = embeddings if embeddings.dtype == torch.float16 else embeddings.float()
    return unit_rows(embeddings) if by_cosine and len(embeddings) else embeddings


def compares_by_cosine(encoder: SentenceTransformer) -> bool:
    """Return whether embeddings must be scaled to unit norm, because no module of the encoder does it.

    Raises:
        ValueError: if the encoder compares by a distance.
    """
    if encoder.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(
            f"the encoder compares by {encoder.similarity_fn_name} distance, but labels are found by the dot product. "
            "Set its similarity_fn_name to 'cosine' or 'dot'."
        )
    done = normalises(encoder) and encoder.dtype != torch.bfloat16  # its unit norms are off by 0.4 %
    return encoder.similarity_fn_name == "cosine" and not done
