"""The losses as modules: each remembers its settings and calls its function in :mod:`hf_xmc.losses.streaming`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses import streaming


class EmbeddingLoss(nn.Module):
    """Base class of the losses: a temperature, a memory budget and a function of the embeddings."""

    function: ClassVar[Callable[..., Tensor]]
    weighs_labels: ClassVar[bool] = False  # whether a label can stand for several

    def __init__(self, temperature: float, memory_budget: int, gradient_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if memory_budget < 1:
            raise ValueError(f"memory_budget is a number of bytes above 0, got {memory_budget}.")
        self.temperature, self.memory_budget, self.gradient_dtype = temperature, memory_budget, gradient_dtype

    def forward(
        self,
        queries: Tensor,
        labels: Tensor,
        positives: Tensor,
        weights: Tensor | None = None,
        shard: LabelShard | None = None,
        label_weights: Tensor | None = None,
        text_counts: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings ``(B, D)`` and ``(L, D)``; arguments as in :mod:`hf_xmc.losses.streaming`.

        Args:
            label_weights: ``(L,)``, how many labels each stands for in the sums over labels; 1 for a positive.
            text_counts: ``(L,)``, how many rows of ``labels`` are texts of each label; it scores as the best of them.

        Raises:
            ValueError: if ``label_weights`` are given and the loss has no sums over labels.
        """
        queries = queries / self.temperature
        if label_weights is not None:
            if not self.weighs_labels:
                raise ValueError(f"{type(self).__name__} cannot weigh labels: use it with all of them.")
            # w e^s = e^(s + log w), and <q, y> + log w = <(q, 1), (y, log w)>: weights need no code of their own.
            queries = F.pad(queries, (0, 1), value=1.0)
            if text_counts is not None:
                label_weights = label_weights.repeat_interleave(text_counts)
            labels = torch.cat([labels, label_weights.log()[:, None].to(labels.dtype)], dim=1)
        return self.function(
            queries,
            labels,
            positives,
            weights=weights,
            shard=shard,
            memory_budget=self.memory_budget,
            gradient_dtype=self.gradient_dtype,
            text_counts=text_counts,
            **self.settings(),
        )

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the function, without the temperature."""
        return {}

    def get_config_dict(self) -> dict[str, Any]:
        """The settings as plain numbers, for the model card."""
        return {"temperature": self.temperature}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.get_config_dict().items())


class DecoupledSoftmaxLoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.decoupled_softmax_loss`.

    Args:
        temperature: divides the similarities. 1 for the dot product of embeddings whose norm is free, about 0.05 for
            cosines.
        memory_budget: bytes for scores, see :mod:`hf_xmc.losses.streaming`.
        gradient_dtype: ``torch.bfloat16`` for less precise gradients, made faster on some hardware, see there.
    """

    function = staticmethod(streaming.decoupled_softmax_loss)
    weighs_labels = True

    def __init__(
        self,
        temperature: float = 1.0,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(temperature, memory_budget, gradient_dtype)


class SoftmaxLoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.softmax_loss`; settings as in :class:`DecoupledSoftmaxLoss`."""

    function = staticmethod(streaming.softmax_loss)
    weighs_labels = True

    def __init__(
        self,
        temperature: float = 1.0,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(temperature, memory_budget, gradient_dtype)


class SoftTopKLoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.soft_top_k_loss`.

    Args:
        k: the prediction budget.
        alpha: sharpness.
        temperature, memory_budget, gradient_dtype: as in :class:`DecoupledSoftmaxLoss`.
    """

    function = staticmethod(streaming.soft_top_k_loss)

    def __init__(
        self,
        k: float = 5,
        alpha: float = 1.0,
        temperature: float = 1.0,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(temperature, memory_budget, gradient_dtype)
        if not (k > 0 and alpha > 0):
            raise ValueError(f"k and alpha must be positive, got k={k} and alpha={alpha}.")
        self.k, self.alpha = k, alpha

    def settings(self) -> dict[str, Any]:
        return {"k": self.k, "alpha": self.alpha}

    def get_config_dict(self) -> dict[str, Any]:
        return {"k": self.k, "alpha": self.alpha, **super().get_config_dict()}


class BCELoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.bce_loss`, with a learned bias and scale.

    Args:
        bias: where the learned bias starts, about minus the logarithm of the number of labels. ``None``: no bias and no
            scale, which is the loss that fails for dual encoders.
        temperature, memory_budget, gradient_dtype: as in :class:`DecoupledSoftmaxLoss`. The scale starts at 1, after
            the temperature.
    """

    function = staticmethod(streaming.bce_loss)

    def __init__(
        self,
        bias: float | None = -10.0,
        temperature: float = 1.0,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(temperature, memory_budget, gradient_dtype)
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.log_scale = None if bias is None else nn.Parameter(torch.tensor(0.0))

    def settings(self) -> dict[str, Any]:
        if self.bias is None or self.log_scale is None:
            return {}
        return {
            "bias": distributed.mean_gradient(self.bias),
            "scale": distributed.mean_gradient(self.log_scale).exp(),
        }

    def get_config_dict(self) -> dict[str, Any]:
        learned = {} if self.bias is None else {"bias": round(self.bias.item(), 4)}
        return {**learned, **super().get_config_dict()}
