"""Training a dual encoder with all labels as negatives, in the loop of sentence-transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
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
from hf_xmc.encoders.static import hold_unknown
from hf_xmc.losses.functional import check_positives
from hf_xmc.losses.modules import DecoupledSoftmaxLoss
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training import learning_rates
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.batching import TASK_ADDED, LabelTable, XMCCollator, draw_positives, with_rows
from hf_xmc.training.evaluation_loss import EvaluationLoss, random_state
from hf_xmc.training.gradient_cache import name_parameters, parameters_reached
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.negatives import AllLabels, MinedNegatives, Step
from hf_xmc.training.nonfinite import UpdateWatch
from hf_xmc.training.refusals import refuse_constructor_arguments, refuse_ways_of_running
from hf_xmc.training.runs import RunTrainer

logger = logging.getLogger(__name__)

NEGATIVES = "negatives-{rank}.safetensors"
LABEL_CHUNK_TOKENS = 8192


class XMCTrainer(RunTrainer):
    """A ``SentenceTransformerTrainer`` in which every query is scored against every label, or a fair sample of them.

    Args:
        model: any ``SentenceTransformer``, unless ``model_init`` makes one. What it becomes loads without this package.
        args: :class:`XMCTrainingArguments`.
        train_dataset: columns ``text``, ``label_ids``, and, where positives are graded, ``label_scores``.
        labels: the label texts, or a data set, as in :class:`hf_xmc.XMCModel`. A label with several texts scores as the
            best of them. ``label_ids`` number the labels from 0, in the order in which each ``label_id`` first occurs.
        loss: a loss of :mod:`hf_xmc.losses`; by default :class:`DecoupledSoftmaxLoss`.
        kwargs: whatever ``SentenceTransformerTrainer`` takes, such as ``evaluator`` and ``callbacks``.

    Raises:
        ValueError: if a column or a value in it is wrong (the message names both), the labels are not texts, or the way
            of running would train something else, such as ``DataParallel``.

    Queries and labels are embedded as by ``encode_query`` and ``encode_document``. ``trainer.negatives`` decides which
    labels a step scores: see :mod:`hf_xmc.training.negatives` and the ``label_mode`` of the arguments.

    An evaluation reports the loss against all labels, with all positives of a query, in every ``label_mode``: the mean
    over the queries that have a positive. It does not change what the training does afterwards.
    """

    data_collator_class = XMCCollator  # type: ignore[assignment]
    training_args_class = XMCTrainingArguments
    args: XMCTrainingArguments
    loss: torch.nn.Module
    train_dataset: Dataset
    _evaluation: EvaluationLoss | None = None  # of the evaluation that is running

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: XMCTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        *,
        labels: Sequence[str] | Dataset,
        loss: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        train_dataset = as_dataset(train_dataset, "train_dataset")
        refuse_constructor_arguments({**kwargs, "args": args, "loss": loss}, model)
        self.labels = checked_labels(labels)
        self._table, _ = LabelTexts.of(self.labels)
        if model is not None:
            roles.refuse_unusable(model)
        super().__init__(model=model, args=args, train_dataset=train_dataset, loss=loss, **kwargs)
        self.prepare_for_model()

    def prepare_for_model(self) -> None:
        """Make everything that depends on the model or the arguments; called again if `model_init` makes a new model.

        What can fail comes first, and the model is changed last.
        """
        sharded_weights = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.args.check()
        self._eval_dataloaders.clear()  # whose persistent workers read texts for the model before
        refuse_ways_of_running(self.args, self.model, sharded_weights=sharded_weights)
        self.loss.model = self.model  # the optimizer is given the parameters of the loss, and no others
        self.data_collator = self.get_data_collator(self.model, self.args)  # type: ignore[assignment]
        texts, counts = self._table.texts["text"][:], self._table.text_counts
        probe: list[Any] = [{"text": text, "label_ids": []} for text in texts[:8]]
        roles.check_embeddings(
            self.model, self.loss, texts[:8], lambda: self.collect_features(self.data_collator(probe))[0][0]
        )
        static = isinstance(self.model[0], StaticEmbedding)
        tokens = self.args.label_chunk_tokens or (None if static else LABEL_CHUNK_TOKENS)
        size = self.args.label_chunk_size
        chunks: dict[str, Any] = {"chunk_size": size, "chunk_tokens": tokens}
        table = LabelTable(self.model, texts, text_counts=counts, device=self.args.device, **chunks)
        self.negatives = self._negatives(table, self.args.label_mode or ("exact" if static else "fresh"))
        self.watch = UpdateWatch(self.args.on_nonfinite, self.loss, self._embed_queries)
        if distributed.world_size() > 1 and any(isinstance(module, Router) for module in self.model.modules()):
            reached = parameters_reached(self.model, table.features(np.array([0])))
            self.model.register_forward_hook(partial(name_parameters, reached))
        roles.score_by_product(self.model)
        hold_unknown(self.model)
        self.model.prompts = dict(roles.named_prompts(self.model))
        self.settings = roles.settings(self.model)

    def preprocess_dataset(self, dataset: Any = None, dataset_name: str | None = None) -> Any:
        if dataset is not None:
            dataset = checked_splits(dataset, len(self._table), f"{dataset_name}_dataset")
        return super().preprocess_dataset(dataset, dataset_name)

    def _negatives(self, table: LabelTable, mode: str) -> AllLabels | LabelBank | MinedNegatives:
        args, normalised = self.args, roles.normalises(self.model)
        if mode == "mined":
            return MinedNegatives(table, len(self.train_dataset), args.num_hard_negatives, args.num_random_negatives)
        if mode == "bank":
            if not getattr(self.loss, "weighs_labels", False):
                raise ValueError(
                    f"{type(self.loss).__name__} cannot weigh labels, which label_mode `bank` needs: use `fresh`, or "
                    "DecoupledSoftmaxLoss or SoftmaxLoss."
                )
            return LabelBank(table, self.loss, args.label_sample_share, args.label_bank_max_age, normalised)
        return AllLabels(table, None if mode == "exact" else args.label_sample_share, normalised)

    def get_default_loss(self, model: SentenceTransformer) -> torch.nn.Module:
        return DecoupledSoftmaxLoss()

    def get_optimizer_cls_and_kwargs(self, args: XMCTrainingArguments, model: Any = None) -> Any:
        args = learning_rates.with_words(args, self.loss, self.model, self.negatives)
        return super().get_optimizer_cls_and_kwargs(args, model)

    def get_data_collator(self, model: SentenceTransformer, args: XMCTrainingArguments, **kwargs: Any) -> XMCCollator:
        return self.data_collator_class(model.preprocess, prompts={"text": roles.prompt_of(model, "query") or ""})

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
        features = {name.removeprefix("text_"): value for name, value in inputs.items() if name.startswith("text_")}
        if TASK_ADDED in inputs:
            features.pop("task")
        return [{**features, ROLE: "query"}], inputs.get("label")

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> Any:
        # Without this a process may have a batch less than another in an epoch, and they wait for each other for ever.
        # The last batches are filled up with rows of the first ones.
        self.accelerator.even_batches = True
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and dataset_kind == "train"  # an evaluation is of all queries
        batch_size = self._batch_size if dataset_kind == "train" else batch_size
        dataset = checked_queries(dataset, len(self._table), f"{dataset_kind}_dataset")  # another may have been set
        try:
            return super()._build_dataloader(with_rows(dataset), batch_size, dataset_kind)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        encoder = self.accelerator.unwrap_model(model)
        step, queries = self._gather(model, inputs, self.args.num_positives)
        candidates = self.negatives.select(encoder, step)  # whose labels are mine
        texts = self.negatives.embed(encoder, candidates)  # (T / W, D), outside DDP: embedded again in backward
        loss = candidates.loss(self.loss, queries, texts, step.weights)
        loss = scale_gradient(loss, self.accelerator.num_processes)  # DDP will take the mean where the sum is meant
        return (loss, {}) if return_outputs else loss

    def _gather(self, model: torch.nn.Module, inputs: dict[str, Any], num_positives: int | None) -> tuple[Step, Tensor]:
        """The queries of a step of all processes, and their embeddings with a gradient."""
        roles.refuse_other_settings(self.accelerator.unwrap_model(model), self.settings)
        (features,), positives = self.collect_features(inputs)
        weights = inputs.get("label_weights")
        assert positives is not None  # the collator makes them
        check_positives(positives, len(self._table))
        if num_positives is not None:
            weights = draw_positives(positives, weights, num_positives)
        queries = gather_queries(embed(model, features))  # (B, D), through DDP: arms the synchronisation
        positives = gather_rows(positives, fill=IGNORE_INDEX)  # (B, P)
        weights = None if weights is None else gather_rows(weights)
        return Step(queries.detach(), positives, weights, inputs.get("row")), queries

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch against all labels, with all its positives, whatever the `label_mode`."""
        evaluation = self._evaluation or EvaluationLoss(self.negatives.table, self.loss)
        with torch.no_grad(), self.compute_loss_context_manager():
            step, _ = self._gather(model, self._prepare_inputs(inputs), num_positives=None)
            return evaluation.add(self.accelerator.unwrap_model(model), step), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as the stock trainer, with the mean loss over the queries, and leave training state unchanged."""
        self._evaluation = evaluation = EvaluationLoss(self.negatives.table, self.loss)
        restore_random_state = random_state(self.args.device)
        try:
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

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args)
        self.watch.add(inputs, loss)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Called once an update, when the gradients are complete and before they are used."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.watch.check(grad_norm, self.state.global_step + 1, self.accelerator.scaler)
        return grad_norm

    def _embed_queries(self, inputs: dict[str, Any]) -> Tensor:
        (features,), _ = self.collect_features(self._prepare_inputs(inputs))
        return embed(self.model, features)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self.watch = UpdateWatch(self.args.on_nonfinite, self.loss, self._embed_queries)
        if self.args.auto_find_batch_size and batch_size is not None:
            self._train_batch_size = batch_size
            self._start_from_the_first_state()
        logger.warning(self.describe_step())
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    @property
    def _batch_size(self) -> int:
        """Queries of a process in a batch; the stock code reads the argument, whatever size is being tried."""
        return int(self._train_batch_size if self.args.auto_find_batch_size else self.args.train_batch_size)

    def describe_step(self) -> str:
        """One sentence on what a step does: negatives of a query, labels embedded, memory."""
        world_size = self.accelerator.num_processes
        batch = self._batch_size * world_size
        dim = self.model.get_embedding_dimension() or 0
        sample = self.train_dataset[:1000]["label_ids"]
        positives = sum(len(ids) for ids in sample) / max(1, len(sample))
        labels, texts = len(self._table), len(self._table.texts)
        scored, embedded = self.negatives.describe(batch, positives)
        embeddings = 2 * 4 * dim * scored * texts / labels / world_size
        scores = min(getattr(self.loss, "memory_budget", 0), 4 * batch * scored / world_size)
        sentence = (
            f"Each of {batch} queries a step ({world_size} process(es)) is scored against {scored:.0f} of {labels} "
            f"labels: about {scored - positives:.0f} negatives a query. Each process {embedded}, and holds about "
            f"{(embeddings + scores) / 2**20:.0f} MiB of label embeddings, gradients and scores."
        )
        temperature = float(getattr(self.loss, "temperature", 0))
        if roles.normalises(self.model) and temperature >= 0.5:
            sentence += (
                f" The encoder normalises, so scores lie within +-{1 / temperature:.1f} and nothing can be "
                "told apart: use a temperature of about 0.05."
            )
        return sentence

    def save_state(self, folder: Path) -> None:
        if state := self.negatives.state_dict():
            save_file(state, folder / NEGATIVES.format(rank=distributed.rank()))

    def load_state(self, folder: Path) -> None:
        if isinstance(self.negatives, AllLabels):
            return
        path = folder / NEGATIVES.format(rank=self.negatives.state_of)
        if not path.exists():
            raise ValueError(
                f"{folder} has no {path.name}: it was saved with another label_mode or by "
                "fewer processes. Resume with the settings that the run began with."
            )
        self.negatives.load_state_dict(load_file(path))
