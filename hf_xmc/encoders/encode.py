"""Embedding queries and labels to predict with: so that their dot product is the encoder's own similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor

from hf_xmc.encoders.forward import embed
from hf_xmc.encoders.phrases import embed_standalone, is_standalone
from hf_xmc.encoders.roles import encode, normalises, preprocess, prompt_of
from hf_xmc.tensors import unit


def encode_queries(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Tensor:
    """Return the ``(N, D)`` embeddings of ``encode_query``, of unit norm if the encoder compares by the cosine.

    They are float16 if the encoder is, and float32 otherwise: an index has no bfloat16. Phrases, and a single text,
    take half the time of ``encode_query``.

    Raises:
        ValueError: if the encoder compares by a distance, or if it cannot embed queries.
    """
    texts, by_cosine = list(texts), compares_by_cosine(encoder)
    usual = type(encoder) is SentenceTransformer
    if usual and is_standalone(encoder) and encoder.truncate_dim is None:
        queries = embed_standalone(encoder, texts, batch_size, prompt_of(encoder, "query"))
    elif usual and len(texts) == 1:
        queries = _encode_one(encoder, texts[0])
    else:
        queries = encode(encoder, texts, "query", batch_size)
    return comparable(queries, by_cosine)


def encode_labels(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Tensor:
    """Return the ``(L, D)`` embeddings of ``encode_document``; otherwise as :func:`encode_queries`."""
    by_cosine = compares_by_cosine(encoder)
    return comparable(encode(encoder, texts, "document", batch_size), by_cosine)


def comparable(embeddings: Tensor, by_cosine: bool) -> Tensor:
    """Return embeddings ``(N, D)`` as an index takes them: in float16 or float32, and of unit norm for the cosine."""
    embeddings = embeddings if embeddings.dtype == torch.float16 else embeddings.float()
    return unit(embeddings) if by_cosine and len(embeddings) else embeddings


def compares_by_cosine(encoder: SentenceTransformer) -> bool:
    """Return whether embeddings must be scaled to unit norm, because no module of the encoder does it.

    Raises:
        ValueError: if the encoder compares by a distance.
    """
    if encoder.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(
            f"the encoder compares by {encoder.similarity_fn_name} distance, but labels are found by a product: set "
            "its similarity_fn_name to 'cosine' or 'dot'."
        )
    done = normalises(encoder) and encoder.dtype != torch.bfloat16  # whose unit norms are off by 0.4 %
    return encoder.similarity_fn_name == "cosine" and not done


@torch.inference_mode()
def _encode_one(encoder: SentenceTransformer, text: str) -> Tensor:
    if encoder.training:
        encoder.eval()
    return embed(encoder, batch_to_device(preprocess(encoder, [text], "query"), encoder.device))
