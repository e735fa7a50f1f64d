"""All labels as negatives of every query."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_xmc.encoders.forward import Features, embed
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.gradient_cache import embed_in_chunks, embed_sampled, parameters_reached, trainable
from hf_xmc.training.negatives import BatchQueries, LabelColumns, ScoredLabels, StepWork, own_labels


class AllLabels:
    """Every label takes part in every step. The labels are divided among the processes.

    Args:
        table: The tokenized labels.
        fraction: Fraction of the labels that are embedded a second time, with a gradient, see
            :func:`hf_xmc.training.gradient_cache.embed_sampled`. Each process samples its own labels. ``None`` for the
            exact gradient of all labels.
        normalised: Whether the encoder normalises its embeddings.
    """

    saving_rank = None

    def __init__(self, table: TokenizedLabels, fraction: float | None = None, normalised: bool = False) -> None:
        self.table, self.sample_fraction, self.normalised = table, fraction, normalised
        self.label_ids = own_labels(table)
        self.columns = LabelColumns(self.label_ids, table.device)
        self.text_counts = table.counts_of(self.label_ids)
        self.rows, self.place = table.short_first(self.label_ids)
        self.trained: list[nn.Parameter] = []
        self.reached: list[Tensor] = []

    @cached_property
    def chunks(self) -> list[Features]:
        """The features of this process's label texts, made once for all steps."""
        return [features for _, features in self.table.chunks(self.rows)]

    def select(self, encoder: nn.Module, batch: BatchQueries) -> ScoredLabels:
        """Return all labels of this process."""
        positives = self.columns(batch.positives)
        return ScoredLabels(self.label_ids, positives, self.columns.shard, text_counts=self.text_counts)

    @torch.no_grad()
    def embed_without_gradient(self, encoder: nn.Module) -> Tensor:
        """Embed one chunk after another, and keep no features: ``(T / W, D)``."""
        return self._in_order(torch.cat([embed(encoder, features) for _, features in self.table.chunks(self.rows)]))

    def embed(self, encoder: nn.Module, selected: ScoredLabels) -> Tensor:
        """Embed the texts of all labels of this process, label after label: ``(T / W, D)`` with a gradient."""
        return self._in_order(self._embed(encoder))

    def _in_order(self, embeddings: Tensor) -> Tensor:
        return embeddings if self.place is None else embeddings.index_select(0, self.place)

    def _embed(self, encoder: nn.Module) -> Tensor:
        if self.sample_fraction is None:
            return embed_in_chunks(encoder, self.chunks)
        trained = trainable(encoder)
        if list(map(id, trained)) != list(map(id, self.trained)):  # in the first step, and after (un)freezing
            self.trained, self.reached = trained, parameters_reached(encoder, self.table.features(self.rows[:1]))
        return embed_sampled(
            encoder,
            self.reached,
            self.chunks,
            lambda rows: self.table.chunks(self.rows[rows.cpu().numpy()]),
            self.sample_fraction,
            self.normalised,
        )

    def work(self, batch_size: int, num_positives: float) -> StepWork:
        """Return the work of a step, which does not depend on the batch."""
        number = len(self.rows)
        twice = number if len(self.chunks) > 1 else 0
        if self.sample_fraction is not None:
            twice = math.ceil(self.sample_fraction * number)
        return StepWork(len(self.columns), number, twice)

    def state_dict(self) -> dict[str, Tensor]:
        """Return no tensors: nothing changes from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""
