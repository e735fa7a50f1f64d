"""The updates of a training: the optimizer, the norm of the gradients, and what is done if it is not finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.encoders.ragged import RaggedFeatures
from hf_xmc.training import learning_rates
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.label_vectors import LabelVectors
from hf_xmc.training.negatives import Negatives
from hf_xmc.training.nonfinite import NonFiniteGuard
from hf_xmc.training.row_adam import RowAdam
from hf_xmc.training.runs import RunTrainer
from hf_xmc.training.sparse_gradients import clip_gradients


class UpdatingTrainer(RunTrainer):
    """A trainer that checks every update, with sparse gradients if ``sparse_updates`` is set.

    It also updates the label vectors, if there are any.
    """

    args: XMCTrainingArguments
    model: SentenceTransformer
    loss: torch.nn.Module
    negatives: Negatives
    watch: NonFiniteGuard
    word_factor: float
    vectors: LabelVectors | None
    query_tokens: RaggedFeatures | None  # of the training queries, if they are tokenized once
    _tokenized: TokenizedLabels

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        if args.sparse_updates:
            groups = {"params": self._groups_by_rate(model)} if args.word_rarity else {}
            return RowAdam, {"lr": args.learning_rate, **groups}
        args, self.word_factor = learning_rates.with_word_rate(
            args, self.loss, self.model, self.negatives, self._tokenized
        )
        return super().get_optimizer_cls_and_kwargs(args, model)

    def _groups_by_rate(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Return the trained parameters, with the rates of its tokens for the table of a static encoder."""
        queries, labels = self.query_tokens, self._tokenized
        if queries is None:
            raise ValueError(
                "word_rarity must be 0 for an encoder whose queries are not tokenized once: it counts their tokens."
            )
        table: Any = self.model[0].embedding.weight  # type: ignore[union-attr]
        texts = [(queries.of_tokens["input_ids"], np.diff(queries.offsets)), (labels.tokens, labels.lengths)]
        rates = learning_rates.token_rates(texts, len(table), self.args.word_rarity)
        others = [one for one in model.parameters() if one.requires_grad and one is not table]
        row_rates = torch.from_numpy(rates).to(table)
        return [{"params": [table], "row_rates": row_rates}, *([{"params": others}] if others else [])]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args)
        self.watch.add(inputs, loss)
        return loss

    # transformers 5.x clips with a function of torch that raises for sparse gradients. It has no public hook for it.
    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.args.sparse_updates or self.vectors is not None:
            return self._clip_all(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _clip_all(self, model: torch.nn.Module, max_norm: float = math.inf) -> Tensor:
        """Clip the complete gradient of an update, once; return its norm, with that of the label vectors."""
        if self.vectors is None:
            return clip_gradients(model.parameters(), max_norm)
        scaler = self.accelerator.scaler
        scale = self.accelerator.num_processes * (1.0 if scaler is None else scaler.get_scale())
        self.accelerator.unscale_gradients()
        self.vectors.finish_gradient(1 / scale)  # DDP takes the mean of the encoder's, whose loss is multiplied
        return clip_gradients(model.parameters(), max_norm, [self.vectors.weight], self.vectors.shard)

    # transformers 5.x calls this once per update, between the backward pass and the optimizer step. The callback
    # `on_pre_optimizer_step` is not given the norm, which shows on every process whether a gradient is finite.
    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        own = grad_norm is None and (self.args.sparse_updates or self.vectors is not None)
        grad_norm = self._clip_all(model) if own else super()._get_grad_norm(model, grad_norm)
        takes_place = self.watch.check(grad_norm, self.state.global_step + 1, self.accelerator.scaler)
        if self.vectors is not None and takes_place:
            assert self.optimizer is not None  # it steps next
            self.vectors.step(self.optimizer.param_groups[0]["lr"])
        elif self.vectors is not None:
            self.vectors.weight.grad = None
        return grad_norm

    def label_vectors(self) -> Tensor | None:
        """Return the vector of each label ``(L, D)``, ``None`` without ``label_vectors``. Every process must call it.

        ``XMCModel(trainer.model, labels, label_vectors=trainer.label_vectors())`` is the trained model.
        """
        return None if self.vectors is None else self.vectors.everyone()
