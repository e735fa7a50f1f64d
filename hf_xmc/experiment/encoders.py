"""Build the encoder and the loss of an experiment from its settings."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from hf_xmc.data.dataset import XMCData
from hf_xmc.encoders.phrases import phrase_encoder, standalone_encoder
from hf_xmc.encoders.pretrained_start import start_from
from hf_xmc.encoders.static import static_encoder
from hf_xmc.experiment.settings import FEW_TEXTS, LOSSES, MADE, ExperimentSettings
from hf_xmc.losses import DecoupledSoftmaxLoss

START_STD = 0.8  # of vectors that start from a pretrained encoder

logger = logging.getLogger(__name__)


def build_encoder(settings: ExperimentSettings, data: XMCData, seed: int) -> SentenceTransformer:
    """Return the encoder to train; ``static`` and ``phrases`` are built from the training and label texts."""
    encoder = _made(settings, data, seed) if settings.model in MADE else _pretrained(settings)
    if settings.normalize and not isinstance(encoder[-1], Normalize):
        encoder.append(Normalize())
    return encoder


def _made(settings: ExperimentSettings, data: XMCData, seed: int) -> SentenceTransformer:
    """Return an untrained encoder with the vocabulary of the texts."""
    texts = [*data.train["text"][:], *data.labels["text"][:]]
    options: dict[str, Any] = {
        "embedding_dim": settings.embedding_dim,
        "vocab_size": settings.vocab_size,
        "std": settings.initial_std,
        "seed": seed,
    }
    if settings.model == "phrases":
        options["num_phrases"] = settings.num_phrases
        if len(data.train) < FEW_TEXTS:
            logger.info("Pairs and runs that occur once have vectors too, because there are few training texts.")
            options["min_count"] = 1
        encoder = phrase_encoder(texts, **options)
    else:
        encoder = static_encoder(texts, **options)
    if settings.start_from is not None:
        start_from(encoder, SentenceTransformer(settings.start_from, device="cpu"), START_STD)
    return encoder


def _pretrained(settings: ExperimentSettings) -> SentenceTransformer:
    """Return the encoder of that name, with the pooling and the maximum length of the settings."""
    if settings.pooling is None:
        encoder = SentenceTransformer(settings.model)
    else:
        transformer = Transformer(settings.model)
        pooling = Pooling(transformer.get_embedding_dimension(), settings.pooling)
        encoder = SentenceTransformer(modules=[transformer, pooling])
    if settings.max_seq_length is not None:
        encoder.max_seq_length = settings.max_seq_length
    return encoder


def plain(encoder: SentenceTransformer, settings: ExperimentSettings) -> SentenceTransformer:
    """Return the trained encoder as an encoder of plain texts."""
    return standalone_encoder(encoder) if settings.model == "phrases" else encoder


def build_loss(settings: ExperimentSettings) -> DecoupledSoftmaxLoss:
    """Return the loss in the settings."""
    extra: dict[str, Any] = {"k": settings.k, "alpha": settings.alpha} if settings.loss == "soft_top_k" else {}
    if settings.loss_dtype == "bfloat16":
        extra |= {"score_dtype": torch.bfloat16, "gradient_dtype": torch.bfloat16}
    return LOSSES[settings.loss](temperature=settings.temperature, **extra)
