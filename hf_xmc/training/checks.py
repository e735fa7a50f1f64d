"""Refuse settings of the stock trainer that have no effect here, or would change the training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from hf_xmc import distributed
from hf_xmc.data.columns import as_dataset
from hf_xmc.hub.backends import check_trainable
from hf_xmc.st_losses import InBatchLoss

EVALUATOR = "use `evaluator`, which measures the ranking of the labels"
SCORED = "a step scores every query against the labels, and its loss is the mean over the queries"
COLUMNS = "the columns text, label_ids and label_scores are read"
ONE_DATA_SET = "batches are drawn at random from a single training data set"
TWICE = "labels are embedded outside the wrapped model, and some of them a second time"

# Each argument with its accepted values, and the reason or the alternative for an error message.
ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "average_tokens_across_devices": ((True,), SCORED),
    "label_smoothing_factor": ((0,), f"{SCORED}; grade positives in a column `label_scores`"),
    "bf16_full_eval": ((False,), "it would cast the trained weights; use `bf16`"),
    "fp16_full_eval": ((False,), "it would cast the trained weights; use `fp16`"),
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
        "a run cannot resume exactly within a step; use a small `save_steps`",
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
    "even_batches": ((True,), "processes with different numbers of batches would wait for each other forever"),
}
NOT_REENTRANT = "use_reentrant must be False, got True, because labels are embedded again within the backward pass."
STEPS_IN_BACKWARD = (
    "lomo",
    "layerwise",
)  # parts of the names of optimizers that do not wait for the complete gradient


def check_arguments(args: TrainingArguments) -> None:
    """Raise ``ValueError`` if an argument would be ignored, or would change what is trained."""
    given = {name: getattr(args, name) for name in ARGUMENTS if hasattr(args, name)}
    config = {name: getattr(args.accelerator_config, name) for name in ACCELERATOR}
    for prefix, values, table in (("", given, ARGUMENTS), ("accelerator_config: ", config, ACCELERATOR)):
        for name, value in values.items():
            accepted, instead = table[name]
            if value not in accepted:
                raise ValueError(f"{prefix}`{name}` must be {accepted[0]!r}, got {value!r}: {instead}.")
    optimizer = OptimizerNames(args.optim).value
    if any(word in optimizer for word in STEPS_IN_BACKWARD):
        raise ValueError(
            f"`optim` must not update weights during the backward pass, in which labels are embedded again, got "
            f"{optimizer}. Use adamw_torch, or another optimizer that steps afterwards."
        )
    checkpointing = args.gradient_checkpointing_kwargs
    if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise ValueError(f"activation_checkpointing_kwargs (gradient_checkpointing_kwargs): {NOT_REENTRANT}")


def check_constructor_arguments(given: Mapping[str, Any], model: Any) -> None:
    """Raise ``ValueError`` if an argument of the stock constructor is not supported.

    Args:
        given: The arguments, by name.
        model: The encoder, if there is one.
    """
    check_trainable(model)
    if (loss := given.get("loss")) is not None and not callable(loss):
        raise ValueError(
            f"`loss` must be a single loss of hf_xmc.losses, for the single training data set, got {type(loss)}."
        )
    for name, instead in (
        ("compute_metrics", EVALUATOR),
        ("preprocess_logits_for_metrics", EVALUATOR),
        ("data_collator", "the trainer makes it for its model. Set `data_collator_class` in a subclass of XMCTrainer"),
        ("optimizer_cls_and_kwargs", "pass `optimizers`, or set `optim` and `optim_args` in the arguments"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"`{name}` must be None: {instead}.")
    for name in ("processing_class", "tokenizer"):
        own = [getattr(model, attribute, None) for attribute in ("processor", "tokenizer")]
        if (other := given.get(name)) is not None and not any(other is mine for mine in own):
            raise ValueError(f"`{name}` must be that of the encoder, got another one. Set it in the model first.")
    if not isinstance(data := given.get("eval_dataset"), dict | None):
        as_dataset(data, "eval_dataset")
    optimizer, _ = given.get("optimizers") or (None, None)
    if optimizer is not None and getattr(given.get("args"), "learning_rate_mapping", None):
        raise ValueError("`learning_rate_mapping` must be empty with a given optimizer. Set the rates in its groups.")


def check_loss(loss: nn.Module) -> None:
    """Raise ``ValueError`` if a loss does not take embeddings and positives."""
    if isinstance(loss, InBatchLoss):
        name = type(loss.loss).__name__
        raise ValueError(
            f"`loss` must be a loss of hf_xmc.losses, got hf_xmc.st_losses.{name}, which is for "
            f"SentenceTransformerTrainer. Use hf_xmc.losses.{name}()."
        )
    try:
        inspect.signature(loss.forward).bind(*["queries", "labels", "positives", "weights", "shard", "label_weights"])
    except TypeError as error:
        raise ValueError(
            f"`loss` must take queries, labels and positives like the losses of hf_xmc.losses, got {type(loss)} "
            f"({error}). Use one of them, or SentenceTransformerTrainer for losses of sentence-transformers."
        ) from error


def check_run(args: TrainingArguments, model: nn.Module, *, sharded_weights: bool) -> None:
    """Raise ``ValueError`` if the processes would train incorrectly, or publish private files.

    Args:
        args: The arguments of the run.
        model: The encoder.
        sharded_weights: Whether FSDP or DeepSpeed is in use.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"one process must see one GPU, got {args.n_gpu}, and would run DataParallel without sharding. Start one "
            "process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
        )
    if args.auto_find_batch_size and distributed.world_size() > 1:
        raise ValueError(
            "`auto_find_batch_size` must be False on several processes: a process that runs out of memory would start "
            "again while the others wait for it. Set per_device_train_batch_size, or lower label_chunk_tokens."
        )
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy` must be end or every_save, got {strategy.value}, which would publish pickles of the "
            "optimizer."
        )
    if getattr(args, "sparse_updates", False):
        check_sparse_updates(args, model)
    elif getattr(args, "word_rarity", 0):
        raise ValueError(
            f"word_rarity must be 0 without sparse_updates, which have a rate for each row, got {args.word_rarity}. "  # type: ignore[attr-defined]
            "Set sparse_updates=True for a static encoder."
        )
    if sharded_weights:
        raise ValueError("FSDP and DeepSpeed are not supported with sharded labels. Use plain DistributedDataParallel.")
    for name, module in model.named_modules():
        checkpointing = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and checkpointing.get("use_reentrant"):
            raise ValueError(f"gradient checkpointing of {name}: {NOT_REENTRANT}")


def check_sparse_updates(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ``ValueError`` if ``sparse_updates`` would have no effect, or would ignore another argument."""
    if not any(isinstance(module, StaticEmbedding) for module in model.modules()):
        raise ValueError(
            "sparse_updates must be False for an encoder without static embeddings: each step changes all its weights."
        )
    if distributed.world_size() > 1 and args.device.type != "cpu":
        raise ValueError(
            f"sparse_updates must be False on several processes with devices of type {args.device.type}, whose "
            "libraries do not add up sparse gradients. Start one process, or train on the CPU."
        )
    default = type(args).__dataclass_fields__["optim"].default
    for name, accepted in (("weight_decay", 0), ("fp16", False), ("optim_args", None), ("optim", default)):
        if getattr(args, name) != accepted:
            raise ValueError(
                f"{name} must be {accepted!r} with sparse_updates, which update rows by RowAdam, got "
                f"{getattr(args, name)!r}. Leave one of them out."
            )
