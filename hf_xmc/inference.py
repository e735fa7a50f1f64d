"""Embedding queries and labels to predict with: so that their dot product is the encoder's own similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router
from sentence_transformers.util import batch_to_device
from torch import Tensor

from hf_xmc.index import unit
from hf_xmc.phrases import embed_standalone, is_standalone


def encode_queries(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Tensor:
    """``(N, D)``: what ``encode_query`` gives, of length one where the encoder compares by the cosine.

    Of phrases, and of one text alone, in half the time.

    Raises:
        ValueError: the encoder compares by a distance.
    """
    texts, by_cosine = list(texts), compares_by_cosine(encoder)
    routed = any(isinstance(module, Router) for module in encoder.modules())
    usual = type(encoder) is SentenceTransformer and not routed and encoder.truncate_dim is None
    usual = usual and not encoder.prompts.get("query", encoder.default_prompt_name)
    if usual and is_standalone(encoder):
        queries = embed_standalone(encoder, texts, batch_size)
    elif usual and len(texts) == 1:
        queries = _encode_one(encoder, texts[0])
    else:
        settings: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        queries = encoder.encode_query(texts, **settings)
    return unit(queries) if by_cosine and texts else queries


def encode_labels(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Tensor:
    """``(L, D)``: what ``encode_document`` gives; otherwise as :func:`encode_queries`."""
    by_cosine = compares_by_cosine(encoder)
    settings: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    labels = encoder.encode_document(list(texts), **settings)
    return unit(labels) if by_cosine else labels


def compares_by_cosine(encoder: SentenceTransformer) -> bool:
    """Whether embeddings must be brought to length one, since no module does it.

    Raises:
        ValueError: the encoder compares by a distance.
    """
    if encoder.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(
            f"the encoder compares by {encoder.similarity_fn_name} distance, but labels are found by a product: set "
            "its similarity_fn_name to 'cosine' or 'dot'."
        )
    done = isinstance(encoder[-1], Normalize) and encoder.truncate_dim is None
    return encoder.similarity_fn_name == "cosine" and not done


@torch.inference_mode()
def _encode_one(encoder: SentenceTransformer, text: str) -> Tensor:
    if encoder.training:
        encoder.eval()
    features = batch_to_device(encoder.preprocess([text]), encoder.device)
    embedding: Tensor = encoder(features)["sentence_embedding"]
    return embedding
