"""Training arguments that are derived from the encoder and the number of training queries, unless they are given."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainingArguments

from hf_xmc.training.arguments import XMCTrainingArguments

logger = logging.getLogger(__name__)

STEPS_PER_EPOCH = 15  # minimum, unless the batches become too small
NAMES = ("learning_rate", "per_device_train_batch_size", "num_train_epochs")  # of the arguments


class Rule(NamedTuple):
    """The values for a kind of encoder.

    The learning rate falls with the square root of the number of steps, within ``rates``.
    """

    kind: str
    rates: tuple[float, float]  # smallest and largest
    batch: tuple[int, int]  # smallest and largest
    epochs: int


STATIC = Rule("a static encoder", (0.04, 0.04), (32, 1024), 8)
TRANSFORMER = Rule("a transformer", (5e-5, 3e-4), (16, 64), 3)
MANY_STEPS = 2000  # which the smallest rate is for


def rule_for(encoder: SentenceTransformer) -> Rule:
    """Return the values for an encoder."""
    return STATIC if isinstance(encoder[0], StaticEmbedding) else TRANSFORMER


def arguments_for(
    encoder: SentenceTransformer,
    args: TrainingArguments,
    num_queries: int,
    given: Collection[str] = (),
    epochs: float | None = None,
) -> dict[str, tuple[Any, str]]:
    """Return the value of each argument in ``NAMES``, and the reason; no number of epochs if ``max_steps`` is set.

    The batch is the largest power of two within the rule that gives enough steps per epoch. With few steps, the
    learning rate of a transformer is higher.

    Args:
        encoder: The encoder before training.
        args: The training arguments.
        num_queries: Number of training queries.
        given: Names of the arguments whose values in ``args`` are kept.
        epochs: Number of epochs, by default that of the rule.
    """
    rule = rule_for(encoder)
    epochs = args.num_train_epochs if "num_train_epochs" in given else epochs or rule.epochs
    smallest, batch = rule.batch
    while batch > smallest and num_queries // args.world_size < batch * STEPS_PER_EPOCH:
        batch //= 2
    batch = args.per_device_train_batch_size if "per_device_train_batch_size" in given else batch
    per_epoch = -(-num_queries // (batch * args.world_size))
    steps = args.max_steps if args.max_steps > 0 else epochs * per_epoch / args.gradient_accumulation_steps
    lowest, highest = rule.rates
    rate = min(highest, max(lowest, lowest * math.sqrt(MANY_STEPS / max(1, steps))))
    about = rule.kind if lowest == highest else f"{rule.kind}, {math.ceil(steps)} steps"
    found: dict[str, tuple[Any, str]] = {
        "learning_rate": (float(f"{rate:.2g}"), about),
        "per_device_train_batch_size": (batch, f"{per_epoch} batches an epoch"),
    }
    if args.max_steps <= 0:
        found["num_train_epochs"] = epochs, rule.kind
    return found


def complete(args: XMCTrainingArguments) -> tuple[XMCTrainingArguments, list[str]]:
    """Return the arguments with the defaults of transformers for missing ones, and the names of these.

    ``args`` stays unchanged, so that another trainer may choose other values.
    """
    missing = [name for name in NAMES if getattr(args, name) is None]
    args = copy.copy(args) if missing else args
    for name in missing:
        setattr(args, name, TrainingArguments.__dataclass_fields__[name].default)
    return args, missing


def fill(args: XMCTrainingArguments, missing: list[str], encoder: SentenceTransformer, num_queries: int) -> None:
    """Set missing arguments to the values for an encoder and a number of queries. One log line names them."""
    found = arguments_for(encoder, args, num_queries, set(NAMES) - set(missing))
    chosen = {name: found[name] for name in missing if name in found}
    for name, (value, _) in chosen.items():
        setattr(args, name, value)
    log_chosen(chosen)


def log_chosen(chosen: Mapping[str, tuple[Any, str]]) -> None:
    """Log chosen values and their reasons in one line."""
    if chosen:
        said = ", ".join(f"{name} {value} ({why})" for name, (value, why) in chosen.items())
        logger.info("Chosen for this encoder and these data, unless you set them: %s", said)
