"""The losses as modules: each stores its settings and calls a function of :mod:`hf_xmc.losses.streaming`.

These are for :class:`hf_xmc.XMCTrainer`, which passes them embeddings of all labels. The losses of the same names in
:mod:`hf_xmc.st_losses` are for the stock ``SentenceTransformerTrainer``, which passes a loss the columns of a batch.
Either trainer refuses the other's losses before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses import functional, streaming
from hf_xmc.losses.streaming import StreamingOptions

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="EmbeddingLoss")
COSINE_TEMPERATURE, FREE_TEMPERATURE = 0.05, 1.0


class EmbeddingLoss(nn.Module):
    """Base class of the losses of query and label embeddings.

    Args:
        temperature: Number that divides the similarities. By default the trainer that takes the loss chooses 0.05 for
            an encoder that normalises its embeddings, and 1 for any other. Without a trainer, the default is 1.
        memory_budget: Memory for scores, in bytes.
        gradient_dtype: ``torch.bfloat16`` for less precise gradients, which are faster on some hardware.
        engine: ``"torch"``, ``"triton"`` or ``"auto"``.
        score_dtype: ``torch.bfloat16`` for less precise scores, which are faster on the same hardware.
            :mod:`hf_xmc.losses.streaming` explains all four settings.

    Attributes:
        dense: The loss of a score matrix, in :mod:`hf_xmc.losses.functional`.
        streamed: The same loss of embeddings, in :mod:`hf_xmc.losses.streaming`.
        supports_label_weights: Whether one label can stand for several in the sums over labels.

    Raises:
        ValueError: if an argument is out of range.
    """

    dense: ClassVar[Callable[..., Tensor]]
    streamed: ClassVar[Callable[..., Tensor]]
    supports_label_weights: ClassVar[bool] = False

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Refuse a model, which only losses for the stock trainer take."""
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module) and cls.__init__.__module__ == __name__:
            raise ValueError(
                f"hf_xmc.losses.{cls.__name__} is for XMCTrainer and takes no model, got {type(model).__name__}. "
                f"For SentenceTransformerTrainer use {_in_batch(cls)}."
            )
        return super().__new__(cls)

    def __init__(
        self,
        temperature: float | None = None,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
        engine: str = "auto",
        score_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._temperature: float | None = None
        self._default_temperature: float | None = None  # set by the trainer that takes the loss
        if temperature is not None:
            self.temperature = temperature
        self.options = StreamingOptions(
            memory_budget=memory_budget, score_dtype=score_dtype, gradient_dtype=gradient_dtype, engine=engine
        )

    @property
    def temperature(self) -> float:
        """The number that divides the similarities: the one given, that of the trainer, or 1."""
        return self._temperature or self._default_temperature or FREE_TEMPERATURE

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"`temperature` must be positive, got {value}.")
        self._temperature = value

    @property
    def memory_budget(self) -> int:
        return self.options.memory_budget

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
        """Return the mean loss over the queries that have a positive.

        Args:
            queries: ``(B, D)`` embeddings.
            labels: ``(L, D)`` embeddings of all labels, or of the shard.
            positives: ``(B, P)`` label ids, counted over all labels and padded with ``IGNORE_INDEX``.
            weights: ``(B, P)`` weight of each positive, 0 for one that is not sampled.
            shard: The range of labels that this process holds; ``None`` if it holds all of them.
            label_weights: ``(L,)`` number of labels that each one stands for in the sums over labels; 1 for a positive.
            text_counts: ``(L,)`` number of texts of each label, which are consecutive rows of ``labels``. A label
                scores as the best of its texts.

        Raises:
            ValueError: if ``label_weights`` are given and the loss does not support them.
        """
        queries = queries / self.temperature
        if label_weights is not None:
            if not self.supports_label_weights:
                raise ValueError(
                    f"`label_weights` must be None for {type(self).__name__}, which cannot weight labels. Use it with "
                    "all labels."
                )
            # w e^s = e^(s + log w), and <q, y> + log w = <(q, 1), (y, log w)>, so weights need no separate code.
            queries = F.pad(queries, (0, 1), value=1.0)
            if text_counts is not None:
                label_weights = label_weights.repeat_interleave(text_counts)
            labels = torch.cat([labels, label_weights.log()[:, None].to(labels.dtype)], dim=1)
        options = replace(self.options, shard=shard, text_counts=text_counts)
        return self.streamed(queries, labels, positives, weights=weights, options=options, **self.settings())

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of ``dense`` and ``streamed``, without the temperature."""
        return {}

    def numbers(self) -> dict[str, float]:
        """Return the settings as plain numbers."""
        return {"temperature": self.temperature}

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card, once a trainer has taken the loss.

        Raises:
            ValueError: if ``XMCTrainer`` has not taken the loss. The stock trainer asks for the settings when it is
                constructed, so it cannot start with a loss that it is unable to call.
        """
        if self._default_temperature is None:
            raise ValueError(
                f"hf_xmc.losses.{type(self).__name__} must be given to XMCTrainer before its settings are read for a "
                f"model card. For SentenceTransformerTrainer use {_in_batch(type(self))}."
            )
        return self.numbers()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.numbers().items())


def set_default_temperature(loss: nn.Module, cosines: bool) -> None:
    """Give a loss, and every loss inside it, the temperature to use if none was given, and log that number.

    Args:
        loss: The loss that a trainer takes.
        cosines: Whether the similarities are cosines.
    """
    for module in loss.modules():
        if isinstance(module, EmbeddingLoss):
            module._default_temperature = COSINE_TEMPERATURE if cosines else FREE_TEMPERATURE
            if module._temperature is None:
                kind = "cosines" if cosines else "dot products of embeddings that are not normalised"
                name = type(module).__name__
                logger.info("%s uses the temperature %g, the default for %s.", name, module.temperature, kind)


def _in_batch(cls: type[EmbeddingLoss]) -> str:
    """Return the expression of the corresponding loss for the stock trainer."""
    name = next((c.__name__ for c in cls.__mro__ if c.__module__ == __name__ and c is not EmbeddingLoss), None)
    return f"hf_xmc.st_losses.{name}(model)" if name else "a loss of hf_xmc.st_losses"


class DecoupledSoftmaxLoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.decoupled_softmax_loss`; arguments of :class:`EmbeddingLoss`."""

    dense = staticmethod(functional.decoupled_softmax_loss)
    streamed = staticmethod(streaming.decoupled_softmax_loss)
    supports_label_weights = True


class SoftmaxLoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.softmax_loss`; arguments of :class:`EmbeddingLoss`."""

    dense = staticmethod(functional.softmax_loss)
    streamed = staticmethod(streaming.softmax_loss)
    supports_label_weights = True


class SoftTopKLoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.soft_top_k_loss`.

    Other arguments are those of :class:`EmbeddingLoss`.

    Args:
        k: The prediction budget.
        alpha: Sharpness.

    Raises:
        ValueError: if an argument is out of range.
    """

    dense = staticmethod(functional.soft_top_k_loss)
    streamed = staticmethod(streaming.soft_top_k_loss)

    def __init__(
        self,
        k: float = 5,
        alpha: float = 1.0,
        temperature: float | None = None,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
        engine: str = "auto",
        score_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(temperature, memory_budget, gradient_dtype, engine, score_dtype)
        if not (k > 0 and alpha > 0):
            raise ValueError(f"`k` and `alpha` must be positive, got k={k} and alpha={alpha}.")
        self.k, self.alpha = k, alpha

    def settings(self) -> dict[str, Any]:
        return {"k": self.k, "alpha": self.alpha}

    def numbers(self) -> dict[str, float]:
        return {"k": self.k, "alpha": self.alpha, **super().numbers()}


class BCELoss(EmbeddingLoss):
    """Module form of :func:`hf_xmc.losses.functional.bce_loss`, with a learned bias and scale.

    Other arguments are those of :class:`EmbeddingLoss`. The learned scale multiplies similarities that are already
    divided by the temperature, and starts at 1.

    Args:
        bias: Initial value of the learned bias, about minus the logarithm of the number of labels. ``None`` for no
            bias and no scale, a loss that fails for dual encoders.

    Raises:
        ValueError: if an argument is out of range.
    """

    dense = staticmethod(functional.bce_loss)
    streamed = staticmethod(streaming.bce_loss)

    def __init__(
        self,
        bias: float | None = -10.0,
        temperature: float | None = None,
        memory_budget: int = streaming.MEMORY_BUDGET,
        gradient_dtype: torch.dtype | None = None,
        engine: str = "auto",
        score_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(temperature, memory_budget, gradient_dtype, engine, score_dtype)
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.log_scale = None if bias is None else nn.Parameter(torch.tensor(0.0))

    def settings(self) -> dict[str, Any]:
        if self.bias is None or self.log_scale is None:
            return {}
        return {
            "bias": distributed.mean_gradient(self.bias),
            "scale": distributed.mean_gradient(self.log_scale).exp(),
        }

    def numbers(self) -> dict[str, float]:
        learned = {} if self.bias is None else {"bias": round(self.bias.item(), 4)}
        return {**learned, **super().numbers()}
