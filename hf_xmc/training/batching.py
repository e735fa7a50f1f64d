"""The tensors of a step: queries and positives from the collator, labels from a table of their tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.util import batch_to_device
from torch import Tensor

from hf_xmc.data.columns import Positives, rows_of
from hf_xmc.encoders.forward import Features
from hf_xmc.encoders.ragged import RaggedFeatures, equal, token_counts, token_ids
from hf_xmc.encoders.roles import preprocess
from hf_xmc.losses.functional import positive_weights
from hf_xmc.padding import pad_flat

logger = logging.getLogger(__name__)

TOKENIZE_BATCH = 8192
TASK_ADDED = "task_added"  # key of a batch to which the collator added the task
CHUNK_TEXTS = 32  # a chunk of more texts than this has a multiple of it
PROBE = 8  # texts of a batch that are preprocessed a second time, to compare


class TokenizedLabels:
    """The tokens of all labels, computed once, from which the features of any labels are assembled.

    Any encoder is accepted. If its features are not a list of tokens, such as a bag of words, texts are preprocessed
    each time they are used, which is slower, and a warning is logged.

    Each text is a row. If every label has one text, the rows are the label ids.

    Args:
        encoder: The encoder, whose ``preprocess`` treats labels as documents: see
            :func:`hf_xmc.encoders.roles.prompt_of`.
        texts: The label texts, sorted by label.
        text_counts: ``(L,)``, the number of texts of each label; ``None`` if each has one.
        chunk_size: Maximum number of texts in a chunk; ``None`` for any number.
        chunk_tokens: Maximum number of tokens in a chunk, with padding; ``None`` for any number.
        device: The device of the encoder.

    Raises:
        ValueError: if there are no labels.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        texts: Sequence[str],
        *,
        text_counts: np.ndarray | None = None,
        chunk_size: int | None = None,
        chunk_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(texts):
            raise ValueError("`labels` must have at least one text, got none.")
        self.encoder, self.texts, self.text_counts = encoder, texts, text_counts
        self.chunk_size, self.chunk_tokens, self.device = chunk_size, chunk_tokens, device
        parts, lengths, tokens = [], [], []
        for rows, features, part in read_in_batches(self._preprocessed, len(texts)):
            parts.append(part)
            lengths.append(token_counts(features, len(rows)))
            tokens.append(token_ids(features))
        self.ragged = RaggedFeatures.joined(parts)
        self.lengths = np.concatenate(lengths)  # (T,), in tokens
        self.tokens = np.concatenate(tokens)  # of all texts, concatenated
        if self.ragged is None:
            logger.warning(
                "The features of %s are not lists of tokens per text, so labels are preprocessed in every step.",
                type(encoder[0]).__name__,
            )

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.lengths)

    @property
    def num_labels(self) -> int:
        return len(self) if self.text_counts is None else len(self.text_counts)

    @property
    def unit(self) -> str:
        """The name of a row, for messages."""
        return "labels" if self.text_counts is None else "label texts"

    def by_length(self, label_ids: np.ndarray) -> np.ndarray:
        """Return the same labels sorted by their number of tokens, so that a chunk has little padding."""
        if self._flat:
            return label_ids
        lengths = self.lengths
        if self.text_counts is not None:
            lengths = np.add.reduceat(lengths, self.text_counts.cumsum() - self.text_counts)
        return label_ids[np.argsort(lengths[label_ids], kind="stable")]

    def rows_of(self, label_ids: np.ndarray) -> np.ndarray:
        """Return the rows of these labels' texts, in the order of the labels."""
        if self.text_counts is None:
            return label_ids
        return ranges(self.text_counts.cumsum() - self.text_counts, self.text_counts, label_ids)

    def counts_of(self, label_ids: np.ndarray) -> Tensor | None:
        """Return the number of texts of each of these labels; ``None`` if every label has one text."""
        return None if self.text_counts is None else torch.from_numpy(self.text_counts[label_ids]).to(self.device)

    def short_first(self, label_ids: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
        """Return the rows of these labels' texts sorted by length, and the position of each text in that order.

        Labels with one text keep the order of :meth:`by_length`, and the positions are ``None``.
        """
        rows = self.rows_of(label_ids)
        if self.text_counts is None:
            return rows, None
        order = np.argsort(self.lengths[rows], kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return rows[order], torch.from_numpy(place).to(self.device)

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[slice, Features]]:
        """Yield chunks of at most ``chunk_size`` texts and ``chunk_tokens`` tokens, with at least one text.

        If texts are padded and there are several chunks, one of more than 32 texts has a multiple of 32: tensors of
        few sizes reuse the memory of earlier steps, whereas those of any size split it up, and a process grows.
        """
        lengths = self.lengths[rows]
        start = 0
        while start < len(rows):
            stop = len(rows) if self.chunk_size is None else min(len(rows), start + self.chunk_size)
            if self.chunk_tokens is not None:
                ahead = lengths[start:stop]
                tokens = ahead.cumsum() if self._flat else np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
                stop = start + max(1, int(np.searchsorted(tokens, self.chunk_tokens, side="right")))
            size = stop - start
            if size > CHUNK_TEXTS and size < len(rows) and not self._flat:
                stop -= size % CHUNK_TEXTS
            yield slice(start, stop), self.features(rows[start:stop])
            start = stop

    def features(self, rows: np.ndarray) -> Features:
        """Return the encoder's features of these texts."""
        features = self._preprocessed(rows) if self.ragged is None else self.ragged.features(rows)
        return batch_to_device(features, torch.device(self.device))

    def _preprocessed(self, rows: np.ndarray) -> Features:
        with _padded(self.encoder):
            return preprocess(self.encoder, [self.texts[row] for row in rows.tolist()], "document")

    @property
    def _flat(self) -> bool:
        return self.ragged is not None and self.ragged.flat


def read_in_batches(
    preprocess: Callable[[np.ndarray], Features], num_texts: int
) -> Iterator[tuple[np.ndarray, Features, RaggedFeatures | None]]:
    """Yield the rows of batches of texts, their features, and the same features without padding.

    The last are ``None`` if the features of a text are not one list of tokens, or depend on the other texts of a batch.

    Args:
        preprocess: A function that returns the features of the texts in some rows.
        num_texts: Number of rows.
    """
    for start in range(0, num_texts, TOKENIZE_BATCH):
        rows = np.arange(start, min(num_texts, start + TOKENIZE_BATCH))
        features = preprocess(rows)
        part = RaggedFeatures.of(features)
        probe = np.arange(len(rows))[:: -(-len(rows) // PROBE)][::-1]
        whole = part is not None and equal(part.features(np.arange(len(rows))), features)
        whole = whole and part is not None and equal(part.features(probe), preprocess(rows[probe]))
        yield rows, features, part if whole else None


def ranges(starts: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the integers of the chosen ranges, concatenated.

    >>> ranges(np.array([0, 10, 20]), np.array([1, 2, 3]), np.array([2, 1]))
    array([20, 21, 22, 10, 11])
    """
    starts, lengths = starts[chosen], lengths[chosen]
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


@contextmanager
def _padded(encoder: SentenceTransformer) -> Iterator[None]:
    """Make ``preprocess`` return padded rows. With FlashAttention it may join all texts in one row, without a mask."""
    modules: list[Any] = [module for module in encoder.modules() if getattr(module, "can_flatten_inputs", False)]
    try:
        for module in modules:
            module.can_flatten_inputs = False
        yield
    finally:
        for module in modules:
            module.can_flatten_inputs = True


def with_rows(queries: Dataset) -> Dataset:
    """Return the data set with the row number of each query in a column ``row``."""
    return queries.add_column("row", np.arange(len(queries)))


@dataclass
class XMCCollator(BaseDataCollator):
    """Tokenizes queries and pads their positives ``(b, P)`` as ``label``, and their weights as ``label_weights``.

    A column ``row``, the row number of a query in its data set, is kept.

    The batch key is ``label`` and not ``labels``: with that name, transformers assumes that the loss is already divided
    by the number of accumulation steps.

    Raises:
        ValueError: if a row is invalid, for example if its labels are not a list of integers.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        texts, positives = rows_of(features)
        rows = np.array([row["row"] for row in features]) if "row" in features[0] else None
        return batch_of(self.features_of(texts, features), positives, rows)

    def features_of(self, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> Features:
        """Return the encoder's features of the texts of these rows."""
        prompts: Any = self.prompts or {}
        read: Features = self.preprocess_fn(texts, prompt=self._get_prompt_for_column(prompts, "text"), task="query")
        return read


def batch_of(read: Features, positives: Positives, rows: np.ndarray | None) -> dict[str, Any]:
    """Return the batch of queries with these features, positives and row numbers."""
    batch: dict[str, Any] = {f"text_{name}": value for name, value in read.items()}
    if "task" not in read:  # as in the stock collator; `encode_query` does not add it
        batch |= {"text_task": "query", TASK_ADDED: True}
    batch["label"] = pad_flat(positives.label_ids, positives.offsets)
    if positives.scores is not None:
        batch["label_weights"] = pad_flat(positives.scores, positives.offsets, fill=0.0)
    if rows is not None:
        batch["row"] = torch.from_numpy(rows)
    return batch


def draw_positives(positives: Tensor, weights: Tensor | None, number: int) -> Tensor:
    """Return weights ``(B, P)``: 1 for up to ``number`` positives of each query, drawn by weight, and 0 for the rest.

    Positives are drawn without replacement, by the largest ``log(u) / weight`` (Efraimidis and Spirakis, Weighted
    Random Sampling with a Reservoir, 2006). Random numbers come from torch's CPU generator.
    """
    _, weights = positive_weights(positives, weights, torch.float32)
    keys = torch.rand(positives.shape).to(weights).log() / weights  # minus infinity if the weight is 0
    drawn = keys.topk(min(number, keys.shape[1]), dim=1).indices
    return torch.zeros_like(weights).scatter(1, drawn, 1.0) * (weights > 0)
