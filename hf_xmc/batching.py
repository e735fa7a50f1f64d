"""The tensors of one step: queries and their positives from the collator, labels from a table of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from torch import Tensor

from hf_xmc.encoding import Features
from hf_xmc.functional import positive_weights
from hf_xmc.sharding import IGNORE_INDEX

TOKENIZE_BATCH = 8192


class LabelTable:
    """Every label's tokens, made once: ragged in memory, features of any labels on demand.

    Args:
        encoder: its ``preprocess`` tokenises; it may pad (a transformer) or return one flat stream (static embeddings).
        texts: the label texts.
        prompt, task: as in ``SentenceTransformer.encode``; labels are documents.
        chunk_size, chunk_tokens: how many labels, and how many tokens with their padding, a chunk holds at most;
            ``None`` for any number.
        device: where the encoder is.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        task: str = "document",
        chunk_size: int | None = None,
        chunk_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(texts):
            raise ValueError("there are no labels: give the text of one at least.")
        self.chunk_size, self.chunk_tokens, self.device = chunk_size, chunk_tokens, device
        tokens, lengths = [], []
        self.constant: Features = {}  # what is the same for every text, such as the route to take
        for start in range(0, len(texts), TOKENIZE_BATCH):
            with _padded(encoder):
                features = encoder.preprocess(list(texts[start : start + TOKENIZE_BATCH]), prompt=prompt, task=task)
            ids = features["input_ids"]
            self.flat = "offsets" in features
            if self.flat:
                lengths.append(np.diff(features["offsets"].numpy(), append=len(ids)))
                tokens.append(ids.numpy().astype(np.int32))
            else:
                mask = features["attention_mask"].bool()
                lengths.append(mask.sum(1).numpy())
                tokens.append(ids[mask].numpy().astype(np.int32))
            self.constant = {k: v for k, v in features.items() if not isinstance(v, Tensor)}
            self.token_types = "token_type_ids" in features
        self.constant["task"] = task
        self.tokens = np.concatenate(tokens)
        self.offsets = np.concatenate([[0], np.concatenate(lengths).cumsum()])
        tokenizer = getattr(encoder, "tokenizer", None)
        self.pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a label, ``(L,)``."""
        return np.diff(self.offsets)

    def by_length(self, label_ids: np.ndarray) -> np.ndarray:
        """The same labels, short ones first, so that a chunk holds little padding."""
        return label_ids if self.flat else label_ids[np.argsort(self.lengths[label_ids], kind="stable")]

    def chunks(self, label_ids: np.ndarray) -> Iterator[tuple[slice, Features]]:
        """The labels in pieces of at most ``chunk_size`` labels and ``chunk_tokens`` tokens, one label at least."""
        lengths = self.lengths[label_ids]
        start = 0
        while start < len(label_ids):
            stop = len(label_ids) if self.chunk_size is None else min(len(label_ids), start + self.chunk_size)
            if self.chunk_tokens is not None:
                ahead = lengths[start:stop]
                tokens = ahead.cumsum() if self.flat else np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
                stop = start + max(1, int(np.searchsorted(tokens, self.chunk_tokens, side="right")))
            yield slice(start, stop), self.features(label_ids[start:stop])
            start = stop

    def features(self, label_ids: np.ndarray) -> Features:
        """What ``encoder.preprocess`` would give for these labels' texts."""
        lengths = self.lengths[label_ids]
        ends = lengths.cumsum()
        starts = ends - lengths
        flat = np.arange(lengths.sum()) - np.repeat(starts - self.offsets[label_ids], lengths)
        tokens = torch.from_numpy(self.tokens[flat].astype(np.int64))
        if self.flat:
            offsets = torch.from_numpy(starts)
            return {**self.constant, "input_ids": tokens.to(self.device), "offsets": offsets.to(self.device)}
        mask = torch.arange(int(lengths.max(initial=0))) < torch.from_numpy(lengths)[:, None]
        ids = torch.full(mask.shape, self.pad_token_id).masked_scatter_(mask, tokens)
        padded: Features = {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}
        if self.token_types:
            padded["token_type_ids"] = torch.zeros_like(padded["input_ids"])
        return {**self.constant, **padded}


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


def columns_read(queries: Dataset, name: str) -> Dataset:
    """The columns of queries that a step reads, and no others.

    Raises:
        ValueError: one is missing, or label ids are no integers.
    """
    if missing := {"text", "label_ids"} - set(queries.column_names):
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(queries.column_names)}. "
            "`load_xmc(...).train` has what is needed."
        )
    ids: Any = getattr(queries.features["label_ids"], "feature", None)
    if getattr(ids, "dtype", "").startswith("float"):
        raise ValueError(f"{name}: label_ids are {ids.dtype}; expected integers.")
    return queries.select_columns([name for name in ("text", "label_ids", "label_scores") if name in queries.features])


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
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__([{"text": row["text"]} for row in features])
        for row in features:
            if len(row.get("label_scores", row["label_ids"])) != len(row["label_ids"]):
                raise ValueError(
                    f"the query {row['text'][:60]!r} has {len(row['label_ids'])} label_ids and "
                    f"{len(row['label_scores'])} label_scores: each label has a score, in the same order."
                )
        batch["label"] = pad([row["label_ids"] for row in features])
        if "label_scores" in features[0]:
            batch["label_weights"] = pad([row["label_scores"] for row in features], fill=0.0)
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
