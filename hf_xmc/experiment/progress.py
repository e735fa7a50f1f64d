"""The progress of a training: a bar on a terminal, and one line per evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from hf_xmc.training.trainer import XMCTrainer

SHOWN = ("P@1", "P@5", "PSP@5", "nDCG@5", "R@100")
PATIENCE = 60.0  # seconds without a line, after which the loss is shown


class RunLog(ProgressCallback):
    """Show the loss and the main metrics in percent; ``history.json`` holds all of them.

    Example:
        ``epoch 3 of 8, step 63 of 168: loss 0.147, P@1 76.8, P@5 36.2, PSP@5 35.5, nDCG@5 74.1, R@100 89.5``
    """

    def __init__(self) -> None:
        super().__init__()
        self._loss: float | None = None
        self._last_line = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write a line after an evaluation, and after a minute without one."""
        logs = logs or {}
        self._loss = logs.get("loss", self._loss)
        evaluated = {name: value for name in SHOWN if (value := logs.get(f"eval_{name}")) is not None}
        waited = "loss" in logs and time.monotonic() - self._last_line > PATIENCE
        if not state.is_world_process_zero or not (evaluated or waited):
            return
        self._last_line = time.monotonic()
        values = [] if self._loss is None else [f"loss {float(self._loss):.3g}"]
        values += [f"{name} {100 * float(value):.1f}" for name, value in evaluated.items()]
        epoch, step = state.epoch or 0.0, state.global_step
        epochs = epoch * state.max_steps / step if step else state.num_train_epochs  # the latter is rounded up
        line = f"epoch {epoch:.3g} of {epochs:.3g}, step {step} of {state.max_steps}: {', '.join(values)}"
        tqdm.write(line, file=sys.stderr)


class Lines(RunLog):
    """The lines without the bar."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Show no bar."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Show no bar."""

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Show no bar."""

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Show no bar."""

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Show no bar."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Show no bar."""


def show_progress(trainer: XMCTrainer) -> None:
    """Replace the bar or the printed dictionaries of transformers; a notebook keeps its table."""
    for kind in (ProgressCallback, PrinterCallback):
        if trainer.pop_callback(kind) is not None:
            bar = kind is ProgressCallback and sys.stderr.isatty()
            trainer.add_callback(RunLog() if bar else Lines())
