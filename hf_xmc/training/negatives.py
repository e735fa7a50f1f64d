"""The labels that take part in a training step: the :class:`Negatives` protocol and the records that it passes.

Four classes implement it: :class:`hf_xmc.training.all_labels.AllLabels`,
:class:`hf_xmc.training.label_bank.LabelBank`, :class:`hf_xmc.training.sampled_labels.SampledLabels` and
:class:`hf_xmc.training.mined_negatives.MinedNegatives`. Another class is passed to :class:`hf_xmc.XMCTrainer` as
``negatives``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.gradient_cache import embed_in_chunks


class BatchQueries(NamedTuple):
    """The queries of a training step, on all processes."""

    embeddings: Tensor  # (B, D), without a gradient
    positives: Tensor  # (B, P) label ids, padded with IGNORE_INDEX
    weights: Tensor | None  # (B, P)
    rows: Tensor | None  # (b,), the rows of this process's queries in the training data; None for other queries


class ScoredLabels(NamedTuple):
    """The labels that this process scores in a step."""

    label_ids: np.ndarray  # (n,), in the order of the score columns
    positives: Tensor  # (B, P), columns among those of all processes; IGNORE_INDEX for a label without a column
    shard: LabelShard  # the range of columns that belongs to this process
    label_weights: Tensor | None = None  # (n,), the number of labels that each label stands for
    query_control_variate: Tensor | None = None  # (B, D), added to the gradient at the queries
    text_counts: Tensor | None = None  # (n,), the number of texts of each label; None if every label has one

    def loss(self, loss: nn.Module, queries: Tensor, texts: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of the queries ``(B, D)`` and the texts of these labels ``(t, D)``, label after label.

        Its gradient at the queries includes ``query_control_variate``.
        """
        several = {} if self.text_counts is None else {"text_counts": self.text_counts}
        value: Tensor = loss(queries, texts, self.positives, weights, self.shard, self.label_weights, **several)
        if self.query_control_variate is not None:
            value = value + ((queries - queries.detach()) * self.query_control_variate).sum()
        return value


class StepWork(NamedTuple):
    """The work of one step."""

    scored: float  # labels that a query is scored against, on all processes
    embedded: float  # label texts that this process embeds
    embedded_twice: float | None = None  # those of them that it embeds a second time, for the gradient; None if unknown
    refreshed: int = 0  # further label texts that it embeds without a gradient, to remember
    at_most: bool = False  # whether the numbers are bounds, reached if no two queries share a positive


class Negatives(Protocol):
    """The labels that take part in a training step.

    ``XMCTrainer`` calls :meth:`select` and then :meth:`embed` in every step, on every process.
    """

    @property
    def sample_fraction(self) -> float | None:
        """Fraction of the labels that receive a gradient in a step; ``None`` if it is unknown, or if all labels do.

        It sets the learning rate of word vectors, see :mod:`hf_xmc.training.learning_rates`.
        """
        ...

    @property
    def saving_rank(self) -> int | None:
        """Rank of the process whose ``state_dict`` this process loads; ``None`` if there is no state."""
        ...

    def select(self, encoder: nn.Module, batch: BatchQueries) -> ScoredLabels:
        """Return the labels that this process scores, and the columns of the positives among those of all processes."""
        ...

    def embed(self, encoder: nn.Module, selected: ScoredLabels) -> Tensor:
        """Embed the texts of the selected labels, label after label: ``(t, D)`` with a gradient."""
        ...

    def work(self, batch_size: int, num_positives: float) -> StepWork:
        """Return the work of a step of ``batch_size`` queries with ``num_positives`` positives on average."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must hold for this process."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors that :meth:`state_dict` returned."""
        ...


class LabelColumns:
    """Labels as columns of the scores: the labels of rank 0 first, then those of rank 1, and so on."""

    def __init__(self, label_ids: np.ndarray, device: torch.device | str) -> None:
        mine = torch.from_numpy(label_ids).to(device)
        everyone = distributed.gather_rows(mine[:, None])[:, 0]
        sizes = distributed.gather_rows(torch.tensor([[len(mine)]], device=device))[:, 0]
        start = int(sizes[: distributed.rank()].sum())
        self.shard = LabelShard(start, start + len(mine))
        self.ordered, self.order = everyone.sort()

    def __len__(self) -> int:
        """Return the number of columns, on all processes."""
        return len(self.ordered)

    def __call__(self, label_ids: Tensor) -> Tensor:
        """Return the column of each label id; ``IGNORE_INDEX`` for a label without one."""
        if not len(self.ordered):
            return torch.full_like(label_ids, IGNORE_INDEX)
        place = torch.searchsorted(self.ordered, label_ids).clamp(max=len(self.ordered) - 1)
        return torch.where(self.ordered[place] == label_ids, self.order[place], IGNORE_INDEX)


def own_labels(table: TokenizedLabels) -> np.ndarray:
    """Return the labels of this process, sorted by length.

    Raises:
        ValueError: if there are fewer labels than processes.
    """
    if table.num_labels < distributed.world_size():
        raise ValueError(
            f"{table.num_labels} labels cannot be divided among {distributed.world_size()} processes: start at most "
            f"{table.num_labels}."
        )
    shard = LabelShard.of(table.num_labels, distributed.rank(), distributed.world_size())
    return table.by_length(np.arange(shard.start, shard.stop))


def embed_labels(encoder: nn.Module, table: TokenizedLabels, label_ids: np.ndarray) -> Tensor:
    """Embed the texts of these labels, label after label: ``(t, D)`` with a gradient.

    Without labels, one text is embedded and sliced away. The result keeps its width and its place in the autograd
    graph.
    """
    rows, place = table.short_first(label_ids)
    some = rows if len(rows) else np.array([0])
    embeddings = embed_in_chunks(encoder, [features for _, features in table.chunks(some)])[: len(rows)]
    return embeddings if place is None else embeddings.index_select(0, place)
