"""Hard negatives: the labels that the encoder itself takes for a query's best, and which are not its own."""

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
from hf_xmc.training.negatives import MinedNegatives

BLOCK = 8192  # queries embedded and searched at a time


def mine_hard_negatives(
    encoder: SentenceTransformer,
    queries: Dataset,
    labels: Dataset | Sequence[str],
    depth: int = 100,
    *,
    batch_size: int = 256,
) -> Tensor:
    """The ``depth`` best labels of every query that are not among its own: ``(N, depth)`` int32, -1 where there are
    fewer.

    Each process embeds its share of the label texts and searches for its share of the queries; all end with all rows.

    Args:
        encoder: embeds queries and labels, with their prompts.
        queries: columns ``text`` and ``label_ids``.
        labels: the label texts, in a list or a column ``text``. A ``label_id`` in several rows is one label, which
            scores as the best of its texts.
        depth: how many for each query.
        batch_size: texts embedded at a time.

    Raises:
        ValueError: if queries or labels have a wrong form; the message names row and column.
    """
    table, _ = LabelTexts.of(labels)
    queries = as_dataset(queries, "queries")
    offsets, label_ids, _ = positives_of(queries, len(table), "queries, row ")
    asked = texts_of(queries, "queries, row ")
    mine = encode_labels(encoder, _share(table.texts["text"][:]), batch_size).float()
    index = label_index(LabelIndex(distributed.gather_rows(mine).cpu()), table)
    depth = min(depth, index.num_labels)

    own = _share(range(len(queries)))
    found = torch.full((len(own), depth), -1, dtype=torch.int32)
    for start in range(0, len(own), BLOCK):
        rows = own[start : start + BLOCK]
        ends = offsets[rows.start : rows.stop + 1]
        known = np.stack([np.repeat(np.arange(len(rows)), np.diff(ends)), label_ids[ends[0] : ends[-1]]], axis=1)
        embedded = encode_queries(encoder, asked[rows.start : rows.stop].to_pylist(), batch_size).float().cpu()
        best = index.search(embedded, depth, exclude=known)
        found[start : start + len(rows)] = torch.from_numpy(best.label_ids.astype(np.int32))
    return distributed.gather_rows(found.to(mine.device)).cpu()


def _share(items: Any) -> Any:
    shard = distributed.LabelShard.of(len(items), distributed.rank(), distributed.world_size())
    return items[shard.start : shard.stop]


class HardNegativeMiner(TrainerCallback):
    """Renews the shortlist of an :class:`hf_xmc.XMCTrainer` whose ``label_mode`` is ``mined``.

    Args:
        trainer: whose negatives are mined.
        start: epochs before the first mining; until then the labels of the batch and random ones are the negatives.
        every: epochs from one mining to the next.
        depth: labels on the list of each query.

    A run that resumes within an epoch goes on with the list of its checkpoint.

    >>> trainer.add_callback(HardNegativeMiner(trainer, start=5, every=5))  # doctest: +SKIP
    """

    def __init__(self, trainer: Any, *, start: int = 0, every: int = 1, depth: int = 100) -> None:
        if not isinstance(trainer.negatives, MinedNegatives):
            raise ValueError("only a trainer with label_mode `mined` draws hard negatives: set it in its arguments.")
        if start < 0 or every < 1 or depth < 1:
            raise ValueError(f"start is 0 or more, every and depth 1 or more; got {start}, {every} and {depth}.")
        self.trainer, self.start, self.every, self.depth = trainer, start, every, depth

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = round(state.epoch or 0)
        begun = (state.epoch or 0) != epoch
        if begun or epoch < self.start or (epoch - self.start) % self.every:
            return
        trainer = self.trainer
        encoder = trainer.accelerator.unwrap_model(trainer.model)
        trainer.negatives.shortlist = mine_hard_negatives(encoder, trainer.train_dataset, trainer.labels, self.depth)
