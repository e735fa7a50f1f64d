r"""An optimizer for static encoders that touches only the rows of the tokens in a batch.

A static encoder is one table of token vectors, of which a batch uses a few rows. Adam reads and writes every row in
every step. With the sparse gradients of :mod:`hf_xmc.training.sparse_gradients` this optimizer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

EPSILON = 1e-12


class RowAdam(Optimizer):
    r"""Adam without momentum, with one second moment per row, which updates the rows that have a gradient.

    The second moment :math:`v_r` of row :math:`r` is the average over steps of the mean square of its gradient
    :math:`g_r`. Steps without a gradient count as zeros, so a rare row moves as far as under Adam:

    .. math:: v_r \leftarrow \beta^{\Delta} v_r + (1 - \beta)\, \overline{g_r^2}, \qquad
              w_r \leftarrow w_r - \text{lr} \; a_r \; g_r \Big/ \Big(\sqrt{v_r / (1 - \beta^t)} + \epsilon\Big)

    where :math:`\Delta` is the number of steps since the row was last updated, :math:`t` the number of steps, and
    :math:`a_r` the rate of the row, by default 1. It keeps two numbers per row, and Adam two per weight. (Kingma and
    Ba, Adam, 2015; one moment per row is used for embedding tables in recommendation.)

    Args:
        params: Parameters. The rows of one are the slices along its first dimension; a scalar is one row.
        lr: Learning rate.
        beta: Decay of the second moment, in (0, 1).
        row_rates: ``(R,)``, the factor of the learning rate for each row; ``None`` for 1. All parameters of a group
            then need ``R`` rows.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.999, row_rates: Tensor | None = None
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}.")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1, got {beta}.")
        super().__init__(params, {"lr": lr, "beta": beta, "row_rates": row_rates})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all rows that have a gradient; return the loss of ``closure``, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["beta"], group["row_rates"])
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, in its own precision: torch rounds it to that of the weights."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to("cpu" if name == "step" else parameter.device, copy=True)

    def _update(self, parameter: Tensor, lr: float, beta: float, row_rates: Tensor | None) -> None:
        rows = parameter.shape[0] if parameter.ndim else 1
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["second_moment"] = torch.zeros(rows, device=parameter.device)
            state["last_step"] = torch.zeros(rows, dtype=torch.int64, device=parameter.device)
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            gradient = parameter.grad.coalesce()
            touched, values = gradient.indices()[0], gradient.values()
        else:
            touched, values = torch.arange(rows, device=parameter.device), parameter.grad.reshape(rows, -1)
        values = values.float()
        age = step - state["last_step"][touched]
        moment = state["second_moment"][touched] * beta ** age.to(values.dtype)
        moment += (1 - beta) / values.shape[1] * torch.linalg.vector_norm(values, dim=1).square_()
        state["second_moment"][touched], state["last_step"][touched] = moment, step
        scale = lr / ((moment / (1 - beta**step)).sqrt() + EPSILON)
        if row_rates is not None:
            scale *= row_rates.to(scale.device)[touched]
        change = (values * -scale[:, None]).to(parameter.dtype)
        parameter.view(rows, -1).index_add_(0, touched, change)
