"""Settings of the stock trainer that this one refuses, since it would ignore them or train something else."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import HubStrategy

from hf_xmc.columns import as_dataset
from hf_xmc.training_args import XMCTrainingArguments


def refuse_constructor_arguments(given: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the trainer is given an argument of the stock constructor that it cannot follow."""
    if given.get("data_collator") is not None:
        raise ValueError(
            "data_collator cannot be given: the trainer makes it for its model. Subclass XMCTrainer and set "
            "`data_collator_class`."
        )
    evaluated = given.get("eval_dataset")
    if evaluated is not None and not isinstance(evaluated, dict):
        as_dataset(evaluated, "eval_dataset")


def refuse_ways_of_running(args: XMCTrainingArguments, *, sharded_weights: bool) -> None:
    """Raise ``ValueError`` if the processes would train something else, or publish what should stay private.

    Args:
        args: the arguments of the run.
        sharded_weights: whether FSDP or DeepSpeed is in use.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would run DataParallel and shard nothing: "
            "start one process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
        )
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy {strategy.value} would publish pickles of the optimizer: use end or "
            "every_save, which publish the model."
        )
    if sharded_weights:
        raise ValueError("FSDP and DeepSpeed are not tested with sharded labels: use plain DistributedDataParallel.")
