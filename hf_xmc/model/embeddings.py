"""Embed the texts of a model, and say which texts its encoder cannot read."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.data.labels import LabelTexts
from hf_xmc.encoders.encode import comparable, compares_by_cosine, encode_labels, encode_queries
from hf_xmc.encoders.roles import encode, normalises
from hf_xmc.search.exact import LabelIndex

logger = logging.getLogger(__name__)

BATCH_SIZE = 1024  # texts that are embedded, or answered, at a time


def embed_queries(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Tensor:
    """Return the ``(N, D)`` float32 embeddings of queries, on the CPU."""
    queries = encode_queries(encoder, texts, batch_size)
    return queries.float().cpu().reshape(len(texts), encoder.get_embedding_dimension() or 0)  # `encode` of []: (0,)


def check_norm(norm: float | None, encoder: SentenceTransformer) -> None:
    """Check the norm of new label embeddings.

    Raises:
        ValueError: if it is not positive, or has no effect because the encoder compares by the cosine.
    """
    if norm is not None and not norm > 0:
        raise ValueError(f"`norm` must be positive, got {norm}.")
    if norm is not None and compares_by_cosine(encoder):
        raise ValueError(f"`norm` must be None for an encoder that compares by the cosine, got {norm}.")


def embed_label_texts(
    encoder: SentenceTransformer, texts: Sequence[str], norm: float | None = None, vectors: Tensor | None = None
) -> Tensor:
    """Return the ``(T, D)`` embeddings of label texts, on the CPU. Warn about texts that embed to zero.

    Args:
        encoder: The encoder.
        texts: ``T`` texts.
        norm: Norm of the embeddings; by default the encoder's.
        vectors: ``(T, D)``, the vector of each text's label, which is added; ``None`` for none.
    """
    if not len(texts):
        return torch.empty(0, encoder.get_embedding_dimension() or 0)
    embeddings = encode_labels(encoder, texts, BATCH_SIZE, vectors).detach().cpu()
    if unknown := int((~embeddings.any(1)).sum()):
        logger.warning(
            "%d of %d label texts have no token that the encoder knows: they score 0 for every text, whatever it is "
            "about.",
            unknown,
            len(embeddings),
        )
    return embeddings if norm is None else norm * torch.nn.functional.normalize(embeddings)


def warn_about_unknown(number: int, total: int) -> None:
    """Warn if any of ``total`` texts embeds to zero."""
    if number:
        logger.warning("%d of %d texts hold no token that the encoder knows: they get no label.", number, total)


def checked_vectors(vectors: np.ndarray | Tensor, num_labels: int, embedding_dim: int | None) -> Tensor:
    """Return the vectors of labels ``(L, D)`` in float32.

    Raises:
        ValueError: if they have another shape.
    """
    checked = torch.as_tensor(vectors).detach().cpu().float()
    if tuple(checked.shape) != (num_labels, embedding_dim or 0):
        raise ValueError(
            f"`label_vectors` must have shape {(num_labels, embedding_dim or 0)}, a row for each label, got "
            f"{tuple(checked.shape)}. Pass `trainer.label_vectors()`."
        )
    return checked


def own_share(encoder: SentenceTransformer, query: Tensor, embedding: Tensor, text: str, vector: Tensor) -> float:
    r"""Return what the vector of a label adds to its score.

    .. math:: q \cdot v, \qquad \text{or} \quad \frac{q \cdot v}{\lVert f(t) + v \rVert} \text{ for unit norms}

    Args:
        encoder: The encoder.
        query: ``(D,)``, the embedding of the text that is explained.
        embedding: ``(D,)``, that of the label, as the index holds it.
        text: The label's text.
        vector: ``(D,)``, the vector of the label.
    """
    scale = 1.0
    if normalises(encoder) or compares_by_cosine(encoder):
        whole = encode(encoder, [text], "document", 1)[0].float().cpu() + vector
        scale = float(embedding.float().norm() / whole.norm())
    return scale * float(query @ vector)


def label_embeddings(
    encoder: SentenceTransformer,
    labels: LabelTexts,
    order: np.ndarray,
    given: np.ndarray | Tensor | None,
    vectors: Tensor | None = None,
) -> Tensor:
    """Return the ``(T, D)`` embeddings of the texts of labels, so that dot products are scores.

    Args:
        encoder: The encoder.
        labels: The labels, with ``T`` texts.
        order: ``(T,)``, the row of ``given`` of each text.
        given: Embeddings in the order in which the labels were given; ``None`` to compute them.
        vectors: ``(L, D)``, added to computed embeddings; given ones hold them already.

    Raises:
        ValueError: if ``given`` has another shape, or the encoder compares by a distance.
    """
    if given is None:
        of_texts = None if vectors is None else vectors[torch.from_numpy(labels.label_of)]
        return embed_label_texts(encoder, labels.texts["text"], vectors=of_texts)
    embeddings = comparable(torch.as_tensor(given).detach().cpu(), compares_by_cosine(encoder))
    expected = len(order), encoder.get_embedding_dimension() or 0
    if tuple(embeddings.shape) != expected:
        raise ValueError(
            f"`embeddings` must have shape {expected}, a row for each label text made by this encoder, got "
            f"{tuple(embeddings.shape)}."
        )
    in_order = bool((order == np.arange(len(order))).all())
    return embeddings if in_order else embeddings[torch.from_numpy(order)]


def index_of_texts(
    encoder: SentenceTransformer,
    labels: LabelTexts,
    order: np.ndarray,
    given: np.ndarray | Tensor | LabelIndex | None,
    vectors: Tensor | None = None,
) -> LabelIndex:
    """Return the index of the texts of labels, which is ``given`` itself if that is an index.

    Arguments as in :func:`label_embeddings`.

    Raises:
        ValueError: if ``given`` has another shape, or the encoder compares by a distance.
    """
    if not isinstance(given, LabelIndex):
        return LabelIndex(label_embeddings(encoder, labels, order, given, vectors))
    compares_by_cosine(encoder)  # raises for distances
    check_index(given, len(order), encoder.get_embedding_dimension())
    if (order != np.arange(len(order))).any():
        given.rearrange(order, given.embeddings[:0])
    return given


def check_index(index: object, num_texts: int, embedding_dim: int | None) -> None:
    """Check that an index can replace the one of a model.

    Raises:
        ValueError: if it is no :class:`hf_xmc.LabelIndex`, or has another number of texts or dimensions.
    """
    if not isinstance(index, LabelIndex):
        raise ValueError(f"`index` must be a LabelIndex or a FaissIndex, got {type(index).__name__}.")
    if (index.num_labels, index.embedding_dim) != (num_texts, embedding_dim):
        raise ValueError(
            f"`index` must be of {num_texts} label texts with {embedding_dim} dimensions, got {index.num_labels} with "
            f"{index.embedding_dim}. Make it of `model.index.embeddings`."
        )
