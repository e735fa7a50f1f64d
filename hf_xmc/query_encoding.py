"""Embedding queries to predict with, at less cost than in general where that is possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from sentence_transformers.util import batch_to_device
from torch import Tensor

from hf_xmc.phrases import embed_standalone, is_standalone


def encode_queries(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Tensor:
    """``(N, D)``: what the encoder's ``encode_query`` gives; of phrases, and of one text alone, in half the time."""
    usual = type(encoder) is SentenceTransformer and not isinstance(encoder[0], Router) and encoder.truncate_dim is None
    if usual and not encoder.prompts.get("query", encoder.default_prompt_name):
        if is_standalone(encoder):
            return embed_standalone(encoder, texts, batch_size)
        if len(texts) == 1:
            return _encode_one(encoder, texts[0])
    return encoder.encode_query(list(texts), convert_to_tensor=True, batch_size=batch_size)


@torch.inference_mode()
def _encode_one(encoder: SentenceTransformer, text: str) -> Tensor:
    if encoder.training:
        encoder.eval()
    features = batch_to_device(encoder.preprocess([text]), encoder.device)
    embedding: Tensor = encoder(features)["sentence_embedding"]
    return embedding
