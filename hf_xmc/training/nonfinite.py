"""Numbers that are no numbers: found before they reach the weights, a checkpoint or a release."""

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

MAX_SKIPPED = 10  # updates in a row: a run that skips more trains nothing
MIN_LOSS_SCALE = 1.0  # half precision that overflows below it overflows for another reason


@dataclass
class UpdateWatch:
    """Stops or skips an update of the weights whose loss or gradient is not finite, on every process alike.

    Args:
        policy: ``"stop"`` raises; ``"skip"`` leaves the weights as they are, at most ``MAX_SKIPPED`` times in a row.
        loss: its parameters are those that are trained.
        embed: the embeddings of a batch's queries, to find the one that is not finite.
    """

    policy: str
    loss: nn.Module
    embed: Callable[[dict[str, Any]], Tensor]
    skipped: int = 0  # updates in a row
    _batches: list[dict[str, Any]] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)

    def add(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """A batch that goes into the next update, and its loss."""
        self._batches.append(inputs)
        self._losses.append(loss.detach())

    def check(self, grad_norm: Tensor | float, step: int, scaler: torch.amp.GradScaler | None) -> None:
        """To be called by every process when the gradients are complete, before the optimizer uses them.

        A gradient that overflows in half precision while the loss is finite is left to the ``scaler``, which skips the
        update and lowers the scale, down to :data:`MIN_LOSS_SCALE`.

        Raises:
            FloatingPointError: if the update must stop. The message has the step, the rank and the rows of the batch.
        """
        batches, self._batches = self._batches, []
        losses, self._losses = torch.stack(self._losses), []
        norm = torch.as_tensor(grad_norm, device=losses.device, dtype=losses.dtype)
        found = torch.stack([losses.isfinite().all(), norm.isfinite()]).logical_not().float()
        loss_is_bad, norm_is_bad = map(bool, distributed.max_over_processes(found).tolist())
        if not (loss_is_bad or norm_is_bad):
            self.skipped = 0
            return
        if scaler is not None and not loss_is_bad and scaler.get_scale() > MIN_LOSS_SCALE:
            return
        message = self._describe(batches, losses, norm, step)
        weights = first_non_finite(self.loss.named_parameters())
        self.skipped += 1
        if self.policy == "stop" or weights or self.skipped > MAX_SKIPPED:
            raise FloatingPointError(
                f"{message} {f'The weights themselves are not finite ({weights}). ' if weights else ''}"
                f"{f'{MAX_SKIPPED} updates before it were skipped. ' if self.skipped > MAX_SKIPPED else ''}"
                "Nothing of it has reached the weights or a checkpoint. Lower the learning rate or raise the "
                "temperature, look at these rows, or pass on_nonfinite='skip' to leave such updates out."
            )
        logger.warning("%s The update is skipped.", message)
        if scaler is None:  # which skips by itself
            for parameter in self.loss.parameters():
                parameter.grad = None  # an optimizer passes over what has no gradient, its momentum too

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
            f"Step {step}, rank {distributed.rank()}: the loss is {losses.mean().item():g} and the gradient's norm "
            f"{norm.item():g}. The queries of this rank are the rows {rows} of the training data"
            f"{f', of which {bad} have an embedding that is not finite' if bad else ''}."
        )
