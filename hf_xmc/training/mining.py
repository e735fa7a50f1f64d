"""Hard negatives: the labels with the highest scores for a query that are not its positives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import TrainerCallback

from hf_xmc import distributed
from hf_xmc.data.columns import as_dataset, texts_of
from hf_xmc.data.labels import LabelTexts
from hf_xmc.data.positives import positives_of
from hf_xmc.encoders.encode import encode_labels, encode_queries
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.grouped import label_index

BLOCK = 8192  # queries embedded and searched at a time


def mine_hard_negatives(
    encoder: SentenceTransformer,
    queries: Dataset,
    labels: Dataset | Sequence[str],
    depth: int = 100,
    *,
    batch_size: int = 256,
    label_vectors: Tensor | None = None,
) -> Tensor:
    """Return the ``depth`` best labels of every query without its positives: ``(N, depth)`` int32, padded with -1.

    Each process embeds a part of the label texts and searches for a part of the queries. All processes return all rows.

    Args:
        encoder: The encoder, which embeds queries and labels with their prompts.
        queries: Queries with the columns ``text`` and ``label_ids``.
        labels: Label texts, as a list or as a data set with a column ``text``. Rows with the same ``uid`` are one
            label, which gets the score of its best text.
        depth: Number of labels per query.
        batch_size: Number of texts to embed at a time.
        label_vectors: ``(L, D)``, added to the embeddings of labels, as ``trainer.label_vectors()`` returns them.

    Raises:
        ValueError: if a column or a value of queries or labels is invalid. The message names row and column.
    """
    table, _ = LabelTexts.of(labels)
    queries = as_dataset(queries, "queries")
    offsets, label_ids, _ = positives_of(queries, len(table), "queries, row ")
    asked = texts_of(queries, "queries, row ")
    own_vectors = None if label_vectors is None else label_vectors[_own_part(torch.from_numpy(table.label_of))]
    mine = encode_labels(encoder, _own_part(table.texts["text"][:]), batch_size, own_vectors).float()
    index = label_index(LabelIndex(distributed.gather_rows(mine).cpu()), table)
    depth = min(depth, index.num_labels)

    own = _own_part(range(len(queries)))
    found = torch.full((len(own), depth), -1, dtype=torch.int32)
    for start in range(0, len(own), BLOCK):
        rows = own[start : start + BLOCK]
        ends = offsets[rows.start : rows.stop + 1]
        known = np.stack([np.repeat(np.arange(len(rows)), np.diff(ends)), label_ids[ends[0] : ends[-1]]], axis=1)
        embedded = encode_queries(encoder, asked[rows.start : rows.stop].to_pylist(), batch_size).float().cpu()
        best = index.search(embedded, depth, exclude=known)
        found[start : start + len(rows)] = torch.from_numpy(best.label_ids.astype(np.int32))
    return distributed.gather_rows(found.to(mine.device)).cpu()


def _own_part(items: Any) -> Any:
    shard = distributed.LabelShard.of(len(items), distributed.rank(), distributed.world_size())
    return items[shard.start : shard.stop]


class HardNegativeMiner(TrainerCallback):
    """Updates the shortlist of an :class:`hf_xmc.XMCTrainer` whose ``label_mode`` is ``mined``.

    A run that resumes within an epoch continues with the shortlist of its checkpoint.

    Args:
        trainer: The trainer whose negatives are mined.
        start: Number of epochs before the first mining. Until then the negatives are the labels of the batch and
            random labels.
        every: Number of epochs from one mining to the next.
        depth: Number of labels in the shortlist of each query.

    Raises:
        ValueError: if the trainer's negatives have no shortlist, or a number is out of range.

    >>> trainer.add_callback(HardNegativeMiner(trainer, start=5, every=5))  # doctest: +SKIP
    """

    def __init__(self, trainer: Any, *, start: int = 0, every: int = 1, depth: int = 100) -> None:
        if not hasattr(trainer.negatives, "shortlist"):
            raise ValueError(
                f"`trainer.negatives` must have a shortlist of hard negatives, got {type(trainer.negatives).__name__}. "
                "Set label_mode to `mined` in the training arguments."
            )
        if start < 0 or every < 1 or depth < 1:
            raise ValueError(
                f"`start` must be at least 0, `every` and `depth` at least 1, got {start}, {every} and {depth}."
            )
        self.trainer, self.start, self.every, self.depth = trainer, start, every, depth

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mine at the beginning of an epoch if it is due."""
        epoch = round(state.epoch or 0)
        begun = (state.epoch or 0) != epoch
        if begun or epoch < self.start or (epoch - self.start) % self.every:
            return
        trainer = self.trainer
        encoder = trainer.accelerator.unwrap_model(trainer.model)
        trainer.negatives.shortlist = mine_hard_negatives(
            encoder, trainer.train_dataset, trainer.labels, self.depth, label_vectors=trainer.label_vectors()
        )
