"""Positives of the batch, mined hard negatives and random labels as the negatives of every query."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.negatives import BatchQueries, LabelColumns, ScoredLabels, StepWork, embed_labels


class MinedNegatives:
    """One pool of labels for all queries: the positives of the batch, hard negatives and random labels.

    Known positives of a query are never its negatives, even if another query put them into the pool.

    Args:
        table: The tokenized labels.
        num_queries: Number of training queries.
        num_hard: Number of labels drawn from the shortlist of each query.
        num_random: Number of labels drawn from all labels in each step.
        own_labels_only: Whether each process embeds the labels of its shard, because it alone has their vectors.
            Otherwise the labels of a step are divided evenly.

    Attributes:
        shortlist: ``(N, m)`` hard negatives of each training query, padded with -1; see
            :mod:`hf_xmc.training.mining`. Empty at first.
    """

    sample_fraction = None  # unknown: it depends on the batch
    saving_rank = 0  # all processes have the same shortlist

    def __init__(
        self,
        table: TokenizedLabels,
        num_queries: int,
        num_hard: int = 0,
        num_random: int = 0,
        own_labels_only: bool = False,
    ) -> None:
        self.own_labels_only = own_labels_only
        self.table, self.num_hard, self.num_random = table, num_hard, num_random
        self.shortlist = torch.empty(num_queries, 0, dtype=torch.int32)

    def select(self, encoder: nn.Module, batch: BatchQueries) -> ScoredLabels:
        """Return this process's part of the pool."""
        taking_part = batch.positives != IGNORE_INDEX
        if batch.weights is not None:
            taking_part &= batch.weights > 0
        hard = [] if batch.rows is None else [self._hard(batch.rows)]
        drawn = torch.cat([*hard, self._random()]).to(batch.positives.device)
        pool = torch.cat([batch.positives[taking_part], distributed.gather_rows(drawn[:, None])[:, 0]]).unique()
        ordered = self.table.by_length(pool.cpu().numpy())
        if self.own_labels_only:
            shard = LabelShard.of(self.table.num_labels, distributed.rank(), distributed.world_size())
            label_ids = ordered[(shard.start <= ordered) & (ordered < shard.stop)]
        else:
            label_ids = ordered[distributed.rank() :: distributed.world_size()]  # short and long ones on every process
        columns, text_counts = LabelColumns(label_ids, self.table.device), self.table.counts_of(label_ids)
        return ScoredLabels(label_ids, columns(batch.positives), columns.shard, text_counts=text_counts)

    def embed(self, encoder: nn.Module, selected: ScoredLabels) -> Tensor:
        """Embed the texts of the selected labels, label after label: ``(t, D)`` with a gradient."""
        return embed_labels(encoder, self.table, selected.label_ids)

    def _hard(self, rows: Tensor) -> Tensor:
        shortlist = self.shortlist[rows.cpu()]
        keys = torch.rand(shortlist.shape).masked_fill_(shortlist < 0, -1.0)
        drawn = keys.topk(min(self.num_hard, shortlist.shape[1]), dim=1).indices
        drawn = shortlist.gather(1, drawn).flatten().long()
        return drawn[drawn >= 0]

    def _random(self) -> Tensor:
        """Draw from the labels of this process only, so that processes draw different labels."""
        shard = LabelShard.of(self.table.num_labels, distributed.rank(), distributed.world_size())
        return torch.randint(shard.start, shard.stop, (math.ceil(self.num_random / distributed.world_size()),))

    def work(self, batch_size: int, num_positives: float) -> StepWork:
        """Return the work of a step if the pool holds no label twice."""
        number = min(self.table.num_labels, batch_size * (num_positives + self.num_hard) + self.num_random)
        texts_per_label = len(self.table) / self.table.num_labels
        return StepWork(number, number * texts_per_label / distributed.world_size(), at_most=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shortlist, on the process that saves it."""
        return {"shortlist": self.shortlist} if distributed.rank() == self.saving_rank else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the shortlist.

        Raises:
            ValueError: if it is the shortlist of another number of queries.
        """
        if len(state["shortlist"]) != len(self.shortlist):
            raise ValueError(
                f"the checkpoint has hard negatives for {len(state['shortlist'])} queries, but there are "
                f"{len(self.shortlist)} training queries. Resume with the data set of the first run."
            )
        self.shortlist = state["shortlist"]
