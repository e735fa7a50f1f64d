"""The state at the start of a training, for another attempt with a smaller batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_xmc.training.evaluation_loss import random_state


class FirstState(NamedTuple):
    """A copy of everything that an attempt changes before it runs out of memory."""

    weights: dict[str, Tensor]
    negatives: dict[str, Tensor]
    vectors: dict[str, Tensor]
    parts: tuple[Any, Any]  # the optimizer and the learning rate schedule, if they were given
    states: list[Any]  # their states
    restore_random_state: Callable[[], None]

    @classmethod
    def of(cls, trainer: Any) -> FirstState:
        """Copy the present state of a trainer."""
        given = [part for part in (trainer.optimizer, trainer.lr_scheduler) if part is not None]
        return cls(
            weights={name: value.cpu().clone() for name, value in trainer.loss.state_dict().items()},
            negatives=_copied(trainer.negatives.state_dict()),
            vectors={} if trainer.vectors is None else _copied(trainer.vectors.state_dict()),
            parts=(trainer.optimizer, trainer.lr_scheduler),
            states=[copy.deepcopy(part.state_dict()) for part in given],
            restore_random_state=random_state(trainer.args.device),
        )

    def restore(self, trainer: Any) -> None:
        """Give a trainer the state that was copied."""
        trainer.loss.load_state_dict(self.weights)
        trainer.negatives.load_state_dict(_copied(self.negatives))
        if trainer.vectors is not None:
            trainer.vectors.load_state_dict(self.vectors)
        trainer.optimizer, trainer.lr_scheduler = self.parts
        for part, state in zip([part for part in self.parts if part is not None], self.states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        self.restore_random_state()


def _copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def own_state(loss: nn.Module) -> dict[str, Tensor]:
    """Return the state of a loss without its encoder, such as a learned bias."""
    return {name: value for name, value in loss.state_dict().items() if not name.startswith("model.")}
