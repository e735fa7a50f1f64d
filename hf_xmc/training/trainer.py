"""Train a dual encoder with all labels as negatives, in the loop of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.data.columns import as_dataset, checked_labels
from hf_xmc.data.labels import LabelTexts
from hf_xmc.data.positives import checked_queries, checked_splits
from hf_xmc.distributed import gather_queries, gather_rows, scale_gradient
from hf_xmc.encoders import roles
from hf_xmc.encoders.forward import ROLE, embed
from hf_xmc.encoders.progress import no_card_bars
from hf_xmc.encoders.static import hold_unknown, release_unknown
from hf_xmc.hub.card import record_loss
from hf_xmc.losses.functional import check_positives
from hf_xmc.losses.modules import DecoupledSoftmaxLoss
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training import defaults
from hf_xmc.training.allocator import keep_freed_memory
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.batching import TASK_ADDED, TokenizedLabels, XMCCollator, draw_positives, with_rows
from hf_xmc.training.checks import check_constructor_arguments, check_run
from hf_xmc.training.evaluation_loss import EvaluationLoss, random_state
from hf_xmc.training.gradient_cache import name_parameters, parameters_reached
from hf_xmc.training.label_modes import load_negatives, make_negatives, save_negatives
from hf_xmc.training.label_vectors import LabelVectors, evaluated_with, load_vectors, save_vectors
from hf_xmc.training.negatives import BatchQueries, Negatives
from hf_xmc.training.nonfinite import NonFiniteGuard
from hf_xmc.training.query_tokens import TokenizedCollator, tokenize_once
from hf_xmc.training.sparse_gradients import sparse_gradients
from hf_xmc.training.step_summary import StepSummary, describe_settings, describe_work
from hf_xmc.training.updates import UpdatingTrainer
from hf_xmc.training.vote_loss import VoteLoss, make_vote_loss

# A training changes seven objects that are not its own:
# 1. `model.similarity_fn_name` and `model.prompts` (`prepare_for_model`): the saved encoder must score and prompt texts
#    as the training did. `roles.score_by_product` logs a change of the similarity.
# 2. A forward hook on the model (`prepare_for_model`): DDP must see the parameters that only labels use.
# 3. `loss.model` (`prepare_for_model`): sentence-transformers trains the parameters of the loss.
# 4. `accelerator.even_batches` (`_build_dataloader`): processes must take part in the same number of steps.
# 5. `can_flatten_inputs` of the encoder's modules (`batching`), during tokenization: labels need one row per text.
# 6. `sparse` of static embeddings (`_inner_training_loop`), until the training ends: see `sparse_updates`.
# 7. `.grad` of the parameters (`nonfinite`): an update that is skipped must leave no gradient.

LABEL_CHUNK_TOKENS = 8192


class XMCTrainer(UpdatingTrainer):
    """A ``SentenceTransformerTrainer`` that scores every query against all labels, or an unbiased sample of them.

    Args:
        model: Any ``SentenceTransformer``, unless ``model_init`` makes one. The trained model loads without this
            package.
        args: The arguments, :class:`XMCTrainingArguments`. Those that are missing are derived from the encoder and the
            number of queries, and one log line names them.
        train_dataset: Queries with the columns ``text``, ``label_ids`` and, for graded positives, ``label_scores``.
        labels: Label texts, or a data set, as in :class:`hf_xmc.XMCModel`. A label with several texts scores as the
            best of them. ``label_ids`` number the labels from 0, in the order in which each ``uid`` first occurs.
        loss: A loss of :mod:`hf_xmc.losses`, by default :class:`DecoupledSoftmaxLoss`. Without a temperature it uses
            0.05 if the encoder normalises its embeddings, and 1 otherwise.
        negatives: A function that makes :class:`hf_xmc.training.negatives.Negatives` for the tokenized labels, in place
            of a ``label_mode``.
        kwargs: Other arguments of ``SentenceTransformerTrainer``, such as ``evaluator`` and ``callbacks``.

    Raises:
        ValueError: if a column or a value in it is invalid (the message names both), the labels are not texts, or an
            argument has no effect here or would train something else, such as ``DataParallel``.

    Queries are embedded as in ``encode_query``, and labels as in ``encode_document``. ``trainer.negatives`` selects the
    labels of a step: see :mod:`hf_xmc.training.negatives` and the argument ``label_mode``.

    In every ``label_mode``, an evaluation reports the loss against all labels, with all positives of a query: the mean
    over the queries that have a positive. An evaluation does not affect the training.

    >>> args = XMCTrainingArguments("run", label_mode="fresh", num_train_epochs=3)  # doctest: +SKIP
    >>> XMCTrainer(model, args, data.train, labels=data.labels).train()  # doctest: +SKIP
    """

    data_collator_class = XMCCollator  # type: ignore[assignment]
    training_args_class = XMCTrainingArguments
    args: XMCTrainingArguments
    loss: torch.nn.Module
    train_dataset: Dataset
    _evaluation: EvaluationLoss | None = None  # set during an evaluation
    votes: VoteLoss | None = None  # made with the batches of a training

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: XMCTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        *,
        labels: Sequence[str] | Dataset,
        loss: torch.nn.Module | None = None,
        negatives: Callable[[TokenizedLabels], Negatives] | None = None,
        **kwargs: Any,
    ) -> None:
        train_dataset = as_dataset(train_dataset, "train_dataset")
        check_constructor_arguments({**kwargs, "args": args, "loss": loss}, model)
        self.labels, self._given_negatives = checked_labels(labels), negatives
        self._table, _ = LabelTexts.of(self.labels)
        if model is not None:
            roles.check_usable(model)
        args, missing = defaults.complete(args or self.training_args_class("tmp_trainer"))
        with no_card_bars():
            super().__init__(model=model, args=args, train_dataset=train_dataset, loss=loss, **kwargs)
        defaults.fill(self.args, missing, self.model, len(self.train_dataset))
        self._train_batch_size = self.args.train_batch_size
        self.prepare_for_model()
        self.add_callback(StepSummary(self))

    def prepare_for_model(self) -> None:
        """Make everything that depends on the model or the arguments; called for each model of ``model_init``.

        Checks come first, and the model is changed last.
        """
        self.args.check()
        self._eval_dataloaders.clear()  # their persistent workers tokenize for the model before
        check_run(self.args, self.model, sharded_weights=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        record_loss(self.model, self.loss)
        self.loss.model = self.model  # only the parameters of the loss are given to the optimizer
        self.data_collator = self.get_data_collator(self.model, self.args)  # type: ignore[assignment]
        texts, counts = self._table.texts["text"][:], self._table.text_counts
        probe: list[Any] = [{"text": text, "label_ids": []} for text in texts[:8]]
        roles.check_embeddings(
            self.model, self.loss, texts[:8], lambda: self.collect_features(self.data_collator(probe))[0][0]
        )
        static = isinstance(self.model[0], StaticEmbedding)
        tokens = self.args.label_chunk_tokens or (None if static else LABEL_CHUNK_TOKENS)
        chunks: dict[str, Any] = {"chunk_size": self.args.label_chunk_size, "chunk_tokens": tokens}
        device = self.args.device
        self._tokenized = TokenizedLabels(self.model, texts, text_counts=counts, device=device, **chunks)
        make = self._given_negatives
        rate = self.args.label_vectors
        self.vectors = LabelVectors(self._tokenized, rate) if rate else None
        queries = len(self.train_dataset)
        self.negatives = make_negatives(make, self._tokenized, self.loss, queries, self.args, self.vectors)
        self.word_factor, self.query_tokens = 1.0, None
        self.watch = NonFiniteGuard(self.args.on_nonfinite, self.loss, self._embed_queries)
        if distributed.world_size() > 1 and any(isinstance(module, Router) for module in self.model.modules()):
            reached = parameters_reached(self.model, self._tokenized.features(np.array([0])))
            self.model.register_forward_hook(partial(name_parameters, reached))
        roles.score_by_product(self.model)
        self.model.prompts = dict(roles.named_prompts(self.model))
        self.settings = roles.settings(self.model)

    def preprocess_dataset(self, dataset: Any = None, dataset_name: str | None = None) -> Any:
        if dataset is not None:
            dataset = checked_splits(dataset, len(self._table), f"{dataset_name}_dataset")
        return super().preprocess_dataset(dataset, dataset_name)

    def get_default_loss(self, model: SentenceTransformer) -> torch.nn.Module:
        return DecoupledSoftmaxLoss()

    def get_data_collator(self, model: SentenceTransformer, args: XMCTrainingArguments, **kwargs: Any) -> XMCCollator:
        return self.data_collator_class(model.preprocess, prompts={"text": roles.prompt_of(model, "query") or ""})

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
        features = {name.removeprefix("text_"): value for name, value in inputs.items() if name.startswith("text_")}
        if TASK_ADDED in inputs:
            features.pop("task")
        return [{**features, ROLE: "query"}], inputs.get("label")

    # sentence-transformers 6.x sets even_batches to False for training: a process may then have one batch fewer than
    # another, and they would wait for each other for ever. It also drops the last queries of an evaluation if
    # dataloader_drop_last is set, and ignores the batch size that auto_find_batch_size tries. The public
    # `get_train_dataloader` and its siblings have no argument for any of these.
    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> Any:
        self.accelerator.even_batches = True
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and dataset_kind == "train"  # an evaluation needs all queries
        batch_size = self._batch_size if dataset_kind == "train" else batch_size
        dataset = checked_queries(dataset, len(self._table), f"{dataset_kind}_dataset")  # the user may have replaced it
        collator, rows = self.data_collator, with_rows(dataset)
        if dataset_kind == "train":
            self.data_collator = tokenize_once(collator, self.model, dataset)
            self.votes = make_vote_loss(self.model, dataset, len(self._table), self.data_collator, self.loss, self.args)
            if isinstance(self.data_collator, TokenizedCollator):
                rows, self.query_tokens = rows.select_columns("row"), self.data_collator.tokens
        try:
            return super()._build_dataloader(rows, batch_size, dataset_kind)
        finally:
            self.args.dataloader_drop_last, self.data_collator = drop_last, collator

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        encoder = self.accelerator.unwrap_model(model)
        batch, queries = self._gather(model, inputs, self.args.num_positives)
        selected = self.negatives.select(encoder, batch)  # the labels of this process
        texts = self.negatives.embed(encoder, selected)  # (T / W, D), outside DDP: embedded again in backward
        if self.vectors is not None:
            texts = self.vectors.add(texts, selected)
        loss = selected.loss(self.loss, queries, texts, batch.weights)
        if self.votes is not None and self.state.global_step >= self.args.vote_start * self.state.max_steps:
            loss = loss + self.args.vote_loss * self.votes(encoder, batch, queries)
        loss = scale_gradient(loss, self.accelerator.num_processes)  # DDP takes the mean, and the sum is needed
        return (loss, {}) if return_outputs else loss

    def _gather(self, model: Any, inputs: dict[str, Any], num_positives: int | None) -> tuple[BatchQueries, Tensor]:
        """Return the queries of a step of all processes, and their embeddings with a gradient."""
        roles.check_unchanged_settings(self.accelerator.unwrap_model(model), self.settings)
        (features,), positives = self.collect_features(inputs)
        weights = inputs.get("label_weights")
        assert positives is not None  # the collator makes them
        check_positives(positives, len(self._table))
        if num_positives is not None:
            weights = draw_positives(positives, weights, num_positives)
        queries = gather_queries(embed(model, features))  # (B, D), through DDP: this starts its synchronisation
        positives = gather_rows(positives, fill=IGNORE_INDEX)  # (B, P)
        weights = None if weights is None else gather_rows(weights)
        return BatchQueries(queries.detach(), positives, weights, inputs.get("row")), queries

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch against all labels, with all its positives, in every ``label_mode``."""
        evaluation = self._evaluation or EvaluationLoss(self._tokenized, self.loss, self.vectors)
        with torch.no_grad(), self.compute_loss_context_manager():
            batch, _ = self._gather(model, self._prepare_inputs(inputs), num_positives=None)
            return evaluation.add(self.accelerator.unwrap_model(model), batch), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate with the mean loss over the queries, and leave the random state unchanged."""
        self._evaluation = evaluation = EvaluationLoss(self._tokenized, self.loss, self.vectors)
        restore_random_state = random_state(self.args.device)
        try:
            with evaluated_with(self.evaluator, self._table, self.label_vectors()):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._evaluation = None
            restore_random_state()
        if output.metrics and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = evaluation.mean()
        return output

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self.preprocess_dataset(test_dataset, "test"), *args, **kwargs)

    def _embed_queries(self, inputs: dict[str, Any]) -> Tensor:
        return embed(self.model, self.collect_features(self._prepare_inputs(inputs))[0][0])

    # transformers 5.x calls this once per attempt of auto_find_batch_size, and does not reset the weights, the
    # optimizer or the random state before. `on_train_begin` is too late: the optimizer is wrapped by then.
    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self.watch = NonFiniteGuard(self.args.on_nonfinite, self.loss, self._embed_queries)
        if self.args.auto_find_batch_size and batch_size is not None:
            self._train_batch_size = batch_size
            self._start_again_from_first_state()
        if self.vectors is not None:
            self.vectors.weight.grad = None  # of a training that was interrupted
        hold_unknown(self.model)
        try:
            with keep_freed_memory(self.callback_handler), sparse_gradients(self.model, self.args.sparse_updates):
                return super()._inner_training_loop(batch_size, *args, **kwargs)
        finally:
            release_unknown(self.model)

    @property
    def _batch_size(self) -> int:
        """Number of queries of a process in a batch, also while auto_find_batch_size tries smaller ones."""
        return int(self._train_batch_size if self.args.auto_find_batch_size else self.args.train_batch_size)

    def describe_step(self) -> str:
        """Return a few sentences on a step: negatives of a query, label texts that are embedded, memory."""
        batch_size = self._batch_size * self.accelerator.num_processes
        some = self.train_dataset[:1000]["label_ids"]
        work = describe_work(self.loss, self.negatives, self._tokenized, batch_size, some)
        return work + describe_settings(self.args, self.word_factor)

    def save_state(self, folder: Path) -> None:
        save_negatives(self.negatives, folder)
        save_vectors(self.vectors, folder)

    def load_state(self, folder: Path) -> None:
        load_negatives(self.negatives, folder)
        load_vectors(self.vectors, folder)
