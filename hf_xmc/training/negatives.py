"""The labels that take part in a step: all, or mined ones. :mod:`hf_xmc.training.label_bank` draws a sample.

Each class answers the same two questions: which labels does this process score, and what are the positives called in
that numbering (``select``); and how are those labels embedded (``embed``). What comes after is the same code.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.encoders.forward import Features, embed
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training.batching import LabelTable
from hf_xmc.training.gradient_cache import embed_in_chunks, embed_sampled, parameters_reached, trainable


class Step(NamedTuple):
    """The queries of a step, of all processes."""

    queries: Tensor  # (B, D), without a gradient
    positives: Tensor  # (B, P) label ids
    weights: Tensor | None  # (B, P)
    rows: Tensor | None  # (b,), the places of this process's queries in the training data; None for others


class Candidates(NamedTuple):
    """The labels that this process scores in a step."""

    label_ids: np.ndarray  # (n,), in the order of the scores' columns
    positives: Tensor  # (B, P), counted in the columns of all processes; IGNORE_INDEX for a label that takes no part
    shard: LabelShard  # which of those columns are this process's
    label_weights: Tensor | None = None  # (n,), how many labels each stands for
    query_gradient: Tensor | None = None  # (B, D), what the labels that take no part add to that of the queries
    text_counts: Tensor | None = None  # (n,), how many texts each label has; None if each has one

    def loss(self, loss: nn.Module, queries: Tensor, texts: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of the queries ``(B, D)`` and the texts of these labels ``(t, D)``, label after label.

        Its gradient at the queries includes ``query_gradient``.
        """
        several = {} if self.text_counts is None else {"text_counts": self.text_counts}
        value: Tensor = loss(queries, texts, self.positives, weights, self.shard, self.label_weights, **several)
        if self.query_gradient is not None:
            value = value + ((queries - queries.detach()) * self.query_gradient).sum()
        return value


class Columns:
    """Labels as columns of the scores: those of one process after those of another."""

    def __init__(self, label_ids: np.ndarray, device: torch.device | str) -> None:
        mine = torch.from_numpy(label_ids).to(device)
        everyone = distributed.gather_rows(mine[:, None])[:, 0]
        sizes = distributed.gather_rows(torch.tensor([[len(mine)]], device=device))[:, 0]
        start = int(sizes[: distributed.rank()].sum())
        self.shard = LabelShard(start, start + len(mine))
        self.ordered, self.order = everyone.sort()

    def __call__(self, label_ids: Tensor) -> Tensor:
        """Column of each label id; ``IGNORE_INDEX`` where it has none."""
        if not len(self.ordered):
            return torch.full_like(label_ids, IGNORE_INDEX)
        place = torch.searchsorted(self.ordered, label_ids).clamp(max=len(self.ordered) - 1)
        return torch.where(self.ordered[place] == label_ids, self.order[place], IGNORE_INDEX)


def own_labels(table: LabelTable) -> np.ndarray:
    """This process's share of all labels, short ones first."""
    if table.num_labels < distributed.world_size():
        raise ValueError(
            f"{table.num_labels} labels cannot be shared by {distributed.world_size()} processes: start fewer."
        )
    shard = LabelShard.of(table.num_labels, distributed.rank(), distributed.world_size())
    return table.by_length(np.arange(shard.start, shard.stop))


def embed_candidates(encoder: nn.Module, table: LabelTable, label_ids: np.ndarray) -> Tensor:
    """Embed the texts of these labels, label after label: ``(t, D)`` with a gradient.

    If there is no label, a text is embedded and not returned: shapes and graph stay.
    """
    rows, place = table.short_first(label_ids)
    some = rows if len(rows) else np.array([0])
    embeddings = embed_in_chunks(encoder, [features for _, features in table.chunks(some)])[: len(rows)]
    return embeddings if place is None else embeddings.index_select(0, place)


class AllLabels:
    """Every label takes part in every step; each process has its share of them.

    Args:
        table: the tokenised labels.
        share: of the labels that are embedded again with a gradient, see
            :func:`hf_xmc.training.gradient_cache.embed_sampled`; ``None`` for the exact gradient of all. Each process
            draws its share of its own labels.
        normalised: whether the encoder normalises.
    """

    def __init__(self, table: LabelTable, share: float | None = None, normalised: bool = False) -> None:
        self.table, self.share, self.normalised = table, share, normalised
        self.label_ids = own_labels(table)
        self.columns = Columns(self.label_ids, table.device)
        self.text_counts = table.counts_of(self.label_ids)
        self.rows, self.place = table.short_first(self.label_ids)
        self.trained: list[nn.Parameter] = []
        self.reached: list[Tensor] = []

    @cached_property
    def chunks(self) -> list[Features]:
        """The features of this process's label texts, made once for all steps."""
        return [features for _, features in self.table.chunks(self.rows)]

    def select(self, encoder: nn.Module, step: Step) -> Candidates:
        positives = self.columns(step.positives)
        return Candidates(self.label_ids, positives, self.columns.shard, text_counts=self.text_counts)

    @torch.no_grad()
    def embed_without_gradient(self, encoder: nn.Module) -> Tensor:
        """``(T / W, D)``, one chunk after another; no features are kept."""
        return self._in_order(torch.cat([embed(encoder, features) for _, features in self.table.chunks(self.rows)]))

    def embed(self, encoder: nn.Module, candidates: Candidates) -> Tensor:
        return self._in_order(self._embed(encoder))

    def _in_order(self, embeddings: Tensor) -> Tensor:
        return embeddings if self.place is None else embeddings.index_select(0, self.place)

    def _embed(self, encoder: nn.Module) -> Tensor:
        if self.share is None:
            return embed_in_chunks(encoder, self.chunks)
        trained = trainable(encoder)
        if list(map(id, trained)) != list(map(id, self.trained)):  # at first, and when some are frozen or set free
            self.trained, self.reached = trained, parameters_reached(encoder, self.table.features(self.rows[:1]))
        return embed_sampled(
            encoder,
            self.reached,
            self.chunks,
            lambda rows: self.table.chunks(self.rows[rows.cpu().numpy()]),
            self.share,
            self.normalised,
        )

    def describe(self, batch: int, positives: float) -> tuple[float, str]:
        number = len(self.rows)
        again = "twice" if len(self.chunks) > 1 else "once"
        if self.share is not None:
            again = f"{math.ceil(self.share * number)} of them twice"
        return len(
            self.columns.order
        ), f"embeds {number} {self.table.unit} a step in {len(self.chunks)} chunk(s), {again}"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must hold for this process, if any."""
        return {}


class MinedNegatives:
    """The labels of the batch's positives, hard negatives of its queries and random labels: one pool for all queries.

    A query's known positives are never its negatives, for whichever query they are in the pool.

    Args:
        table: the tokenised labels.
        num_hard: labels drawn from the shortlist of each query.
        num_random: labels drawn from all, a step.

    Attributes:
        shortlist: ``(N, m)`` hard negatives of each training query, -1 where there are fewer; see
            :mod:`hf_xmc.training.mining`. Empty at first.
    """

    state_of = 0  # the process whose state serves all

    def __init__(self, table: LabelTable, num_queries: int, num_hard: int = 0, num_random: int = 0) -> None:
        self.table, self.num_hard, self.num_random = table, num_hard, num_random
        self.shortlist = torch.empty(num_queries, 0, dtype=torch.int32)

    def select(self, encoder: nn.Module, step: Step) -> Candidates:
        taking_part = step.positives != IGNORE_INDEX
        if step.weights is not None:
            taking_part &= step.weights > 0
        hard = [] if step.rows is None else [self._hard(step.rows)]
        drawn = torch.cat([*hard, self._random()]).to(step.positives.device)
        pool = torch.cat([step.positives[taking_part], distributed.gather_rows(drawn[:, None])[:, 0]]).unique()
        ordered = self.table.by_length(pool.cpu().numpy())
        label_ids = ordered[distributed.rank() :: distributed.world_size()]  # long and short ones for every process
        columns, text_counts = Columns(label_ids, self.table.device), self.table.counts_of(label_ids)
        return Candidates(label_ids, columns(step.positives), columns.shard, text_counts=text_counts)

    def embed(self, encoder: nn.Module, candidates: Candidates) -> Tensor:
        return embed_candidates(encoder, self.table, candidates.label_ids)

    def _hard(self, rows: Tensor) -> Tensor:
        shortlist = self.shortlist[rows.cpu()]
        keys = torch.rand(shortlist.shape).masked_fill_(shortlist < 0, -1.0)
        drawn = keys.topk(min(self.num_hard, shortlist.shape[1]), dim=1).indices
        drawn = shortlist.gather(1, drawn).flatten().long()
        return drawn[drawn >= 0]

    def _random(self) -> Tensor:
        """Draw from this process's share of the labels, so that processes draw different ones."""
        shard = LabelShard.of(self.table.num_labels, distributed.rank(), distributed.world_size())
        return torch.randint(shard.start, shard.stop, (math.ceil(self.num_random / distributed.world_size()),))

    def describe(self, batch: int, positives: float) -> tuple[float, str]:
        """Labels scored a step, at most, and what a process does with them."""
        number = min(self.table.num_labels, batch * (positives + self.num_hard) + self.num_random)
        return number, f"embeds up to {number / distributed.world_size():.0f} labels a step"

    def state_dict(self) -> dict[str, Tensor]:
        return {"shortlist": self.shortlist} if distributed.rank() == self.state_of else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if len(state["shortlist"]) != len(self.shortlist):
            raise ValueError(
                f"the checkpoint's hard negatives are those of {len(state['shortlist'])} queries, but there are "
                f"{len(self.shortlist)}: resume with the data set that the run began with."
            )
        self.shortlist = state["shortlist"]
