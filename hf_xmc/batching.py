"""The tensors of one step: queries and their positives from the collator, labels from a table of their tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.util import batch_to_device
from torch import Tensor

from hf_xmc.columns import rows_of
from hf_xmc.encoding import Features
from hf_xmc.functional import positive_weights
from hf_xmc.ragged import RaggedFeatures, equal, token_counts, token_ids
from hf_xmc.roles import preprocess
from hf_xmc.sharding import IGNORE_INDEX

logger = logging.getLogger(__name__)

TOKENIZE_BATCH = 8192
PROBE = 8  # texts of a batch that are preprocessed again, to compare


class LabelTable:
    """The tokens of all labels, made once, from which the features of any labels are put together.

    Any encoder will do. If its features cannot be put together from tokens, as those of a bag of words, the texts are
    preprocessed each time they are needed, which is slower. A log line says so.

    Args:
        encoder: The encoder, whose ``preprocess`` makes features of labels as of documents: see
            :func:`hf_xmc.roles.prompt_of`.
        texts: The label texts.
        chunk_size: Maximum number of labels in a chunk; ``None`` for any number.
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
        chunk_size: int | None = None,
        chunk_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(texts):
            raise ValueError("there are no labels: give the text of one at least.")
        self.encoder, self.texts = encoder, texts
        self.chunk_size, self.chunk_tokens, self.device = chunk_size, chunk_tokens, device
        parts, lengths, tokens = [], [], []
        for start in range(0, len(texts), TOKENIZE_BATCH):
            rows = np.arange(start, min(len(texts), start + TOKENIZE_BATCH))
            features = self._preprocessed(rows)
            part = RaggedFeatures.of(features)
            probe = np.arange(len(rows))[:: -(-len(rows) // PROBE)][::-1]
            whole = part is not None and equal(part.features(np.arange(len(rows))), features)
            whole = whole and part is not None and equal(part.features(probe), self._preprocessed(rows[probe]))
            parts.append(part if whole else None)
            lengths.append(token_counts(features, len(rows)))
            tokens.append(token_ids(features))
        self.ragged = RaggedFeatures.joined(parts)
        self.lengths = np.concatenate(lengths)  # (L,), in tokens
        self.tokens = np.concatenate(tokens)  # of all labels, one after another
        if self.ragged is None:
            logger.warning(
                "The features that %s makes of labels are not a list of tokens for each: labels are preprocessed again "
                "in each step.",
                type(encoder[0]).__name__,
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self, label_ids: np.ndarray) -> np.ndarray:
        """Return the same labels, short ones first, so that a chunk holds little padding."""
        return label_ids if self._flat else label_ids[np.argsort(self.lengths[label_ids], kind="stable")]

    def chunks(self, label_ids: np.ndarray) -> Iterator[tuple[slice, Features]]:
        """Yield chunks of at most ``chunk_size`` labels and ``chunk_tokens`` tokens, with at least one label."""
        lengths = self.lengths[label_ids]
        start = 0
        while start < len(label_ids):
            stop = len(label_ids) if self.chunk_size is None else min(len(label_ids), start + self.chunk_size)
            if self.chunk_tokens is not None:
                ahead = lengths[start:stop]
                tokens = ahead.cumsum() if self._flat else np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
                stop = start + max(1, int(np.searchsorted(tokens, self.chunk_tokens, side="right")))
            yield slice(start, stop), self.features(label_ids[start:stop])
            start = stop

    def features(self, label_ids: np.ndarray) -> Features:
        """Return the features that the encoder makes of these labels' texts."""
        features = self._preprocessed(label_ids) if self.ragged is None else self.ragged.features(label_ids)
        return batch_to_device(features, torch.device(self.device))

    def _preprocessed(self, label_ids: np.ndarray) -> Features:
        with _padded(self.encoder):
            return preprocess(self.encoder, [self.texts[label] for label in label_ids.tolist()], "document")

    @property
    def _flat(self) -> bool:
        return self.ragged is not None and self.ragged.flat


@contextmanager
def _padded(encoder: SentenceTransformer) -> Iterator[None]:
    """With FlashAttention `preprocess` may put all texts into one row, which has no mask; not in here."""
    modules: list[Any] = [module for module in encoder.modules() if getattr(module, "can_flatten_inputs", False)]
    try:
        for module in modules:
            module.can_flatten_inputs = False
        yield
    finally:
        for module in modules:
            module.can_flatten_inputs = True


def with_rows(queries: Any) -> Any:
    """A data set, or a dictionary of them, with the place of each query as a column ``row``."""
    if isinstance(queries, dict):
        return DatasetDict({name: with_rows(part) for name, part in queries.items()})
    if not isinstance(queries, Dataset) or "row" in queries.column_names:
        return queries
    return queries.add_column("row", np.arange(len(queries)))


@dataclass
class XMCCollator(BaseDataCollator):
    """Queries tokenised, their positives ``(b, P)`` padded as ``label``, and ``label_weights`` where there are any.

    A column ``row``, the place of a query in its data set, goes along.

    The batch key is ``label``, never ``labels``: with that name the Trainer takes the loss for one that is already
    divided by the accumulation steps.

    Raises:
        ValueError: if a row has a wrong form, such as labels that are not a list of integers.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        texts, (offsets, label_ids, scores) = rows_of(features)
        prompts: Any = self.prompts or {}
        read = self.preprocess_fn(texts, prompt=self._get_prompt_for_column(prompts, "text"), task="query")
        batch = {f"text_{name}": value for name, value in read.items()}
        bounds = list(pairwise(offsets.tolist()))
        batch["label"] = pad([label_ids[start:stop].tolist() for start, stop in bounds])
        if scores is not None:
            batch["label_weights"] = pad([scores[start:stop].tolist() for start, stop in bounds], fill=0.0)
        if "row" in features[0]:
            batch["row"] = torch.tensor([row["row"] for row in features])
        return batch


def draw_positives(positives: Tensor, weights: Tensor | None, number: int) -> Tensor:
    """``(B, P)`` weights: 1 for up to ``number`` positives of each query, drawn by their weights, 0 for the others.

    Without replacement, by the largest of ``log(u) / weight`` (Efraimidis and Spirakis, Weighted Random Sampling with a
    Reservoir, 2006); random numbers come from torch's generator of the CPU.
    """
    _, weights = positive_weights(positives, weights, torch.float32)
    keys = torch.rand(positives.shape).to(weights).log() / weights  # minus infinity where the weight is 0
    drawn = keys.topk(min(number, keys.shape[1]), dim=1).indices
    return torch.zeros_like(weights).scatter(1, drawn, 1.0) * (weights > 0)


def pad(rows: Sequence[Sequence[float]], fill: float = IGNORE_INDEX) -> Tensor:
    """Ragged rows as one tensor, of int64, or of float32 where ``fill`` is a float.

    >>> pad([[4, 7], [], [1]])
    tensor([[   4,    7],
            [-100, -100],
            [   1, -100]])
    """
    width = max(1, max(map(len, rows), default=0))
    dtype = torch.float32 if isinstance(fill, float) else torch.int64  # of all processes, whatever their rows hold
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)
