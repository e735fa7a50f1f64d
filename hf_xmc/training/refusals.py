"""Settings of the stock trainer that this one refuses, since it would ignore them or train something else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sentence_transformers.base.losses import CachedLossMixin
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from hf_xmc import distributed
from hf_xmc.data.columns import as_dataset

EVALUATOR = "use `evaluator`, which measures the ranking of the labels"
SCORED = "a step scores every query against the labels, and its loss is the mean over the queries"
COLUMNS = "the columns text, label_ids and label_scores are read"
ONE_DATA_SET = "batches are drawn at random from the one training data set"
TWICE = "labels are embedded outside the wrapped model, and some of them a second time"

# Each argument with the values that are accepted, and what holds instead or is to be used.
ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "average_tokens_across_devices": ((True,), SCORED),
    "label_smoothing_factor": ((0,), f"{SCORED}; grade positives in a column `label_scores`"),
    "bf16_full_eval": ((False,), "it would cast the weights that are trained; use `bf16`"),
    "fp16_full_eval": ((False,), "it would cast the weights that are trained; use `fp16`"),
    "torch_compile": ((False,), TWICE),
    "torch_compile_backend": ((None,), TWICE),
    "torch_compile_mode": ((None,), TWICE),
    "use_liger_kernel": ((False,), "it replaces the layers of causal language models"),
    "liger_kernel_config": ((None,), "it replaces the layers of causal language models"),
    "use_cache": ((False,), "an encoder keeps no keys and values"),
    "neftune_noise_alpha": ((None,), f"{TWICE}, with other noise; use dropout in the encoder"),
    "include_num_input_tokens_seen": (("no", False), "the tokens of labels would not be counted"),
    "eval_do_concat_batches": ((True,), f"an evaluation has no predictions; {EVALUATOR}"),
    "eval_use_gather_object": ((False,), f"an evaluation has no predictions; {EVALUATOR}"),
    "include_for_metrics": (([],), EVALUATOR),
    "batch_eval_metrics": ((False,), EVALUATOR),
    "enable_jit_checkpoint": (
        (False,),
        "a run cannot go on exactly from within a step; use a small `save_steps`",
    ),
    "parallelism_config": ((None,), "labels are sharded over the processes of plain DistributedDataParallel"),
    "dataloader_multiprocessing_context": ((None, "fork"), "use `multiprocessing.set_start_method`"),
    "dataloader_in_order": ((True,), "batches come in order"),
    "remove_unused_columns": ((True,), COLUMNS),
    "label_names": ((None, []), COLUMNS),
    "length_column_name": (("length",), COLUMNS),
    "train_sampling_strategy": (("random",), ONE_DATA_SET),
    "batch_sampler": (("batch_sampler",), ONE_DATA_SET),
    "multi_dataset_batch_sampler": (("proportional",), ONE_DATA_SET),
    "ddp_static_graph": ((None, False), TWICE),
    "router_mapping": (({}, {"text": "query"}), "texts take the route `query`, and labels the route `document`"),
    "prompts": ((None,), "prompts are the encoder's own: set model.prompts['query'] and model.prompts['document']"),
}
ACCELERATOR: dict[str, tuple[tuple[Any, ...], str]] = {
    "split_batches": ((False,), "`per_device_train_batch_size` is the batch of a process"),
    "dispatch_batches": ((None, False), "every process reads its own batches"),
    "even_batches": ((True,), "processes whose numbers of batches differ would wait for each other for ever"),
}
NOT_REENTRANT = "use_reentrant must be False, got True: labels are embedded again within the backward pass."
STEPS_IN_BACKWARD = (
    "lomo",
    "layerwise",
)  # in the names of optimizers that do not wait for the whole gradient


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise ``ValueError`` if an argument would be ignored, or would train something else than it says."""
    given = {name: getattr(args, name) for name in ARGUMENTS if hasattr(args, name)}
    config = {name: getattr(args.accelerator_config, name) for name in ACCELERATOR}
    for prefix, values, table in (("", given, ARGUMENTS), ("accelerator_config: ", config, ACCELERATOR)):
        for name, value in values.items():
            accepted, instead = table[name]
            if value not in accepted:
                raise ValueError(f"{prefix}{name} must be {accepted[0]!r}, got {value!r}: {instead}.")
    optimizer = OptimizerNames(args.optim).value
    if any(word in optimizer for word in STEPS_IN_BACKWARD):
        raise ValueError(
            f"optim {optimizer} updates weights during the backward pass, in which labels are embedded again: "
            "use adamw_torch, or another optimizer that steps afterwards."
        )
    checkpointing = args.gradient_checkpointing_kwargs
    if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise ValueError(f"activation_checkpointing_kwargs (gradient_checkpointing_kwargs): {NOT_REENTRANT}")


def refuse_constructor_arguments(given: Mapping[str, Any], model: Any) -> None:
    """Raise ``ValueError`` if the trainer is given an argument of the stock constructor that it cannot follow.

    Args:
        given: the arguments, by name.
        model: the encoder, if it is given.
    """
    if (loss := given.get("loss")) is not None and not callable(loss):
        raise ValueError(f"loss must be one loss of hf_xmc.losses, for the one training data set, got {type(loss)}.")
    for name, instead in (
        ("compute_metrics", EVALUATOR),
        ("preprocess_logits_for_metrics", EVALUATOR),
        ("data_collator", "the trainer makes it for its model; subclass XMCTrainer and set `data_collator_class`"),
        ("optimizer_cls_and_kwargs", "pass `optimizers`, or set `optim` and `optim_args` in the arguments"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{name} cannot be given: {instead}.")
    for name in ("processing_class", "tokenizer"):
        own = [getattr(model, attribute, None) for attribute in ("processor", "tokenizer")]
        if (other := given.get(name)) is not None and not any(other is mine for mine in own):
            raise ValueError(f"{name} must be the encoder's own, got another one: set it in the model before training.")
    if not isinstance(data := given.get("eval_dataset"), dict | None):
        as_dataset(data, "eval_dataset")
    optimizer, _ = given.get("optimizers") or (None, None)
    if optimizer is not None and getattr(given.get("args"), "learning_rate_mapping", None):
        raise ValueError("learning_rate_mapping has no effect on an optimizer that is given: set its rates there.")


def refuse_loss(loss: nn.Module) -> None:
    """Raise ``ValueError`` for a loss that takes something else than embeddings and positives."""
    if isinstance(loss, CachedLossMixin):
        raise ValueError(f"{type(loss)} is for the stock trainer: this one takes the losses of hf_xmc.losses.")
    try:
        inspect.signature(loss.forward).bind(*["queries", "labels", "positives", "weights", "shard", "label_weights"])
    except TypeError as error:
        raise ValueError(
            f"{type(loss)} does not take queries, labels and positives as the losses of hf_xmc.losses do ({error}): "
            "use one of them, or SentenceTransformerTrainer for losses of sentence-transformers."
        ) from error


def refuse_ways_of_running(args: TrainingArguments, model: nn.Module, *, sharded_weights: bool) -> None:
    """Raise ``ValueError`` if the processes would train something else, or publish what should stay private.

    Args:
        args: the arguments of the run.
        model: the encoder.
        sharded_weights: whether FSDP or DeepSpeed is in use.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would run DataParallel and shard nothing: "
            "start one process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
        )
    if args.auto_find_batch_size and distributed.world_size() > 1:
        raise ValueError(
            "auto_find_batch_size must be False on several processes: one that runs out of memory would start again "
            "while the others wait for it. Set per_device_train_batch_size, or lower label_chunk_tokens."
        )
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy {strategy.value} would publish pickles of the optimizer: use end or "
            "every_save, which publish the model."
        )
    if sharded_weights:
        raise ValueError("FSDP and DeepSpeed are not tested with sharded labels: use plain DistributedDataParallel.")
    for name, module in model.named_modules():
        checkpointing = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and checkpointing.get("use_reentrant"):
            raise ValueError(f"gradient checkpointing of {name}: {NOT_REENTRANT}")
