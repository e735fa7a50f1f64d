"""The loss of an evaluation: against all labels, the same each time, and without a trace in the training."""

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
from hf_xmc.training.batching import LabelTable
from hf_xmc.training.negatives import AllLabels, Step

logger = logging.getLogger(__name__)


class EvaluationLoss:
    """The mean of a loss over the queries that have a positive, against all labels.

    The labels are embedded once, at the first batch, and shared among the processes as :class:`AllLabels` does it.
    The size of a batch does not matter, and a row that the sampler repeats to fill a batch counts once.

    Args:
        table: the tokenised labels.
        loss: one of :mod:`hf_xmc.losses`.
    """

    def __init__(self, table: LabelTable, loss: nn.Module) -> None:
        self.table, self.loss = table, loss
        self.labels: AllLabels | None = None
        self.embeddings: Tensor | None = None
        self.total, self.count = 0.0, 0
        self._seen: set[int] = set()

    @torch.no_grad()
    def add(self, encoder: nn.Module, step: Step) -> Tensor:
        """Count the queries of a batch, of all processes; returns the loss of the batch."""
        if self.labels is None or self.embeddings is None:
            self.labels = AllLabels(self.table)
            self.embeddings = self.labels.embed_without_gradient(encoder)
        if step.rows is not None:
            step = step._replace(positives=self._without_repeated(step.positives, step.rows))
        candidates = self.labels.select(encoder, step)
        loss = candidates.loss(self.loss, step.queries, self.embeddings, step.weights)
        _, weights = positive_weights(step.positives, step.weights, torch.float32)
        count = int((weights > 0).any(1).sum())
        self.total += loss.item() * count
        self.count += count
        return loss

    def mean(self) -> float:
        """The loss of all batches; NaN if no query has a positive."""
        if not self.count:
            logger.warning("The evaluation has no loss: no query of its data set has a label.")
            return math.nan
        return self.total / self.count

    def _without_repeated(self, positives: Tensor, rows: Tensor) -> Tensor:
        everyone = distributed.gather_rows(rows[:, None])[:, 0].tolist()
        repeated = [row in self._seen or self._seen.add(row) for row in everyone]  # type: ignore[func-returns-value]
        mask = torch.tensor([bool(again) for again in repeated], device=positives.device)
        return positives.masked_fill(mask[:, None], IGNORE_INDEX)


def random_state(device: torch.device) -> Callable[[], None]:
    """Note the state of the random generators of Python, NumPy and torch; the function returned restores it."""
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
