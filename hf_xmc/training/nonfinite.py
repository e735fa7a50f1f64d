"""Detect NaN and infinity before they reach the weights, a checkpoint or a release."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.tensors import first_non_finite

logger = logging.getLogger(__name__)

MAX_SKIPPED = 10  # consecutive updates: a run that skips more does not train
MIN_LOSS_SCALE = 1.0  # an overflow at this loss scale has a reason other than half precision


@dataclass
class NonFiniteGuard:
    """Stops or skips an update whose loss or gradient is not finite, on all processes together.

    Args:
        policy: ``"stop"`` raises an error. ``"skip"`` leaves the weights unchanged, at most ``MAX_SKIPPED`` times in a
            row.
        loss: The loss, with the parameters that are trained.
        embed: A function that embeds the queries of a batch, to find the query whose embedding is not finite.
    """

    policy: str
    loss: nn.Module
    embed: Callable[[dict[str, Any]], Tensor]
    skipped: int = 0  # consecutive updates
    _batches: list[dict[str, Any]] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)

    def add(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Add a batch of the next update, and its loss."""
        self._batches.append(inputs)
        self._losses.append(loss.detach())

    def check(self, grad_norm: Tensor | float, step: int, scaler: torch.amp.GradScaler | None) -> bool:
        """Check an update, and return whether it takes place.

        Every process calls it when the gradients are complete, before the optimizer step.

        If only the gradient overflows, in half precision, the ``scaler`` handles it: it skips the update and lowers the
        loss scale, down to :data:`MIN_LOSS_SCALE`.

        Raises:
            FloatingPointError: if the training must stop. The message names the step, the rank and the rows of the
                batch.
        """
        batches, self._batches = self._batches, []
        losses, self._losses = torch.stack(self._losses), []
        norm = torch.as_tensor(grad_norm, device=losses.device, dtype=losses.dtype)
        found = torch.stack([losses.isfinite().all(), norm.isfinite()]).logical_not().float()
        loss_is_bad, norm_is_bad = map(bool, distributed.max_over_processes(found).tolist())
        if not (loss_is_bad or norm_is_bad):
            self.skipped = 0
            return True
        if scaler is not None and not loss_is_bad and scaler.get_scale() > MIN_LOSS_SCALE:
            return False
        message = self._describe(batches, losses, norm, step)
        weights = first_non_finite(self.loss.named_parameters())
        self.skipped += 1
        if self.policy == "stop" or weights or self.skipped > MAX_SKIPPED:
            raise FloatingPointError(
                f"{message} {f'The weights themselves are not finite ({weights}). ' if weights else ''}"
                f"{f'The {MAX_SKIPPED} updates before it were skipped. ' if self.skipped > MAX_SKIPPED else ''}"
                "The update has not reached the weights or a checkpoint. Lower the learning rate, raise the "
                "temperature, check these rows, or set on_nonfinite='skip' to skip such updates."
            )
        logger.warning("%s The update is skipped.", message)
        if scaler is None:  # a scaler skips the update itself
            for parameter in self.loss.parameters():
                parameter.grad = None  # optimizers ignore such parameters and their momentum
        return False

    def _describe(self, batches: list[dict[str, Any]], losses: Tensor, norm: Tensor, step: int) -> str:
        rows: list[int] = []
        bad: list[int] = []
        for inputs in batches:
            mine = inputs["row"].tolist() if "row" in inputs else []
            with torch.no_grad():
                finite = self.embed(inputs).isfinite().all(1).tolist()
            rows += mine
            bad += [row for row, is_finite in zip(mine, finite, strict=True) if not is_finite] if mine else []
        return (
            f"Step {step}, rank {distributed.rank()}: the loss is {losses.mean().item():.4g} and the gradient norm is "
            f"{norm.item():.4g}. The queries of this rank are the rows {rows} of the training data"
            f"{f'. The embeddings of rows {bad} are not finite' if bad else ''}."
        )
