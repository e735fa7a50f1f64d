"""The tensors of one step: tokenised labels, padded positives, and which labels take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from torch import Tensor

from hf_xmc import sharding
from hf_xmc.encoding import Features
from hf_xmc.functional import check_positives
from hf_xmc.sharding import IGNORE_INDEX, LabelShard

TOKENIZE_BATCH = 8192


class LabelTable:
    """Every label's tokens, made once: ragged in memory, features of any labels on demand.

    Args:
        encoder: its ``preprocess`` tokenises; it may pad (a transformer) or return one flat stream (static embeddings).
        texts: the label texts.
        prompt, task: as in ``SentenceTransformer.encode``; labels are documents.
    """

    def __init__(
        self, encoder: SentenceTransformer, texts: Sequence[str], prompt: str | None = None, task: str = "document"
    ) -> None:
        tokens, lengths = [], []
        self.constant: Features = {}  # what is the same for every text, such as the route to take
        for start in range(0, len(texts), TOKENIZE_BATCH):
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

    def features(self, label_ids: np.ndarray, device: torch.device | str = "cpu") -> Features:
        """What ``encoder.preprocess`` would give for these labels' texts."""
        lengths = self.lengths[label_ids]
        ends = lengths.cumsum()
        starts = ends - lengths
        flat = np.arange(lengths.sum()) - np.repeat(starts - self.offsets[label_ids], lengths)
        tokens = torch.from_numpy(self.tokens[flat].astype(np.int64))
        if self.flat:
            return {**self.constant, "input_ids": tokens.to(device), "offsets": torch.from_numpy(starts).to(device)}
        mask = torch.arange(int(lengths.max(initial=0))) < torch.from_numpy(lengths)[:, None]
        ids = torch.full(mask.shape, self.pad_token_id).masked_scatter_(mask, tokens)
        padded: Features = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        if self.token_types:
            padded["token_type_ids"] = torch.zeros_like(padded["input_ids"])
        return {**self.constant, **padded}


class Candidates(NamedTuple):
    """The labels that this process scores in a step.

    ``chunks`` are features, in the order of the scores' columns; ``positives`` counts in the columns of all processes,
    of which ``shard`` are this one's.
    """

    chunks: list[Features]
    positives: Tensor
    shard: LabelShard


class AllLabels:
    """Every label takes part in every step; each process has its shard of them.

    Args:
        table: the tokenised labels.
        label_chunk_size: labels embedded at a time; ``None`` for all at once, which suits an encoder that keeps no
            activations.
        device: where the encoder is.
    """

    def __init__(self, table: LabelTable, label_chunk_size: int | None, device: torch.device | str = "cpu") -> None:
        if len(table) < sharding.world_size():
            raise ValueError(f"{len(table)} labels cannot be shared by {sharding.world_size()} processes: start fewer.")
        self.shard = LabelShard.of(len(table), sharding.rank(), sharding.world_size())
        mine = np.arange(self.shard.start, self.shard.stop)
        # By length, so that a chunk of a transformer holds little padding. Columns are numbered in this order.
        mine = mine[np.argsort(table.lengths[mine], kind="stable")] if not table.flat else mine
        self.column_of = torch.empty(len(table), dtype=torch.long)
        orders = sharding.gather_rows(torch.from_numpy(mine)[:, None].to(device))[:, 0].cpu()
        self.column_of[orders] = torch.arange(len(table))
        size = max(1, len(mine)) if label_chunk_size is None else label_chunk_size
        self.chunks = [table.features(mine[i : i + size], device) for i in range(0, len(mine), size)]
        self.num_labels = len(table)

    def __call__(self, positives: Tensor) -> Candidates:
        check_positives(positives, self.num_labels)
        columns = self.column_of.to(positives.device)[positives.clamp(min=0)]
        return Candidates(self.chunks, torch.where(positives == IGNORE_INDEX, IGNORE_INDEX, columns), self.shard)


@dataclass
class XMCCollator(BaseDataCollator):
    """Queries tokenised, their positives ``(b, P)`` padded as ``label``, and ``label_weights`` where there are any.

    A column ``row``, the place of a query in its data set, goes along.

    The batch key is ``label``, never ``labels``: with that name the Trainer takes the loss for one that is already
    divided by the accumulation steps.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__([{"text": row["text"]} for row in features])
        batch["label"] = pad([row["label_ids"] for row in features])
        if "label_scores" in features[0]:
            batch["label_weights"] = pad([row["label_scores"] for row in features], fill=0.0)
        if "row" in features[0]:
            batch["row"] = torch.tensor([row["row"] for row in features])
        return batch


def pad(rows: Sequence[Sequence[float]], fill: float = IGNORE_INDEX) -> Tensor:
    """Ragged rows as one tensor.

    >>> pad([[4, 7], [], [1]])
    tensor([[   4,    7],
            [-100, -100],
            [   1, -100]])
    """
    width = max(1, max(map(len, rows), default=0))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
