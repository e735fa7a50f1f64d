"""The evaluation loss against all labels, which is deterministic and does not affect training."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.losses.functional import positive_weights
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.label_vectors import LabelVectors
from hf_xmc.training.negatives import BatchQueries

logger = logging.getLogger(__name__)


class EvaluationLoss:
    """The mean loss against all labels, over the queries that have a positive.

    The labels are embedded once, at the first batch, and divided among the processes as in :class:`AllLabels`. The
    result does not depend on the batch size. A row that the sampler repeats to fill a batch counts once.

    Args:
        table: The tokenized labels.
        loss: A loss of :mod:`hf_xmc.losses`.
        vectors: The vectors of the labels, if any.
    """

    def __init__(self, table: TokenizedLabels, loss: nn.Module, vectors: LabelVectors | None = None) -> None:
        self.table, self.loss, self.vectors = table, loss, vectors
        self.labels: AllLabels | None = None
        self.embeddings: Tensor | None = None
        self.total, self.count = 0.0, 0
        self._seen: set[int] = set()

    @torch.no_grad()
    def add(self, encoder: nn.Module, batch: BatchQueries) -> Tensor:
        """Add the queries of a batch, from all processes, and return the loss of the batch."""
        first = self.labels is None
        if self.labels is None or self.embeddings is None:
            self.labels = AllLabels(self.table)
            self.embeddings = self.labels.embed_without_gradient(encoder)
        if batch.rows is not None:
            batch = batch._replace(positives=self._without_repeated(batch.positives, batch.rows))
        scored = self.labels.select(encoder, batch)
        if first and self.vectors is not None:
            self.embeddings = self.vectors.add(self.embeddings, scored)
        loss = scored.loss(self.loss, batch.embeddings, self.embeddings, batch.weights)
        _, weights = positive_weights(batch.positives, batch.weights, torch.float32)
        count = int((weights > 0).any(1).sum())
        self.total += loss.item() * count
        self.count += count
        return loss

    def mean(self) -> float:
        """Return the loss of all batches; NaN if no query has a positive."""
        if not self.count:
            logger.warning("The evaluation loss is NaN: no query of the evaluation data set has a label.")
            return math.nan
        return self.total / self.count

    def _without_repeated(self, positives: Tensor, rows: Tensor) -> Tensor:
        everyone = distributed.gather_rows(rows[:, None])[:, 0].tolist()
        repeated = [row in self._seen or self._seen.add(row) for row in everyone]  # type: ignore[func-returns-value]
        mask = torch.tensor([bool(again) for again in repeated], device=positives.device)
        return positives.masked_fill(mask[:, None], IGNORE_INDEX)


def random_state(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the current random state of Python, NumPy and torch."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    accelerator = None if device.type == "cpu" else getattr(torch, device.type)
    there = None if accelerator is None else accelerator.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(there)

    return restore
