"""One line at the start of a training that says what a step does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_xmc import distributed
from hf_xmc.encoders import roles
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.negatives import Negatives

logger = logging.getLogger(__name__)


def describe_work(
    loss: nn.Module, negatives: Negatives, table: TokenizedLabels, batch_size: int, positives: Sequence[Sequence[int]]
) -> str:
    """Return a few sentences on a step: negatives of a query, label texts that a process embeds, memory.

    Args:
        loss: The loss that is trained.
        negatives: The labels of a step.
        table: The tokenized labels, with their encoder.
        batch_size: Number of queries in a step, on all processes.
        positives: Label ids of some training queries.
    """
    encoder, num_labels = table.encoder, table.num_labels
    num_processes, num_positives = distributed.world_size(), sum(map(len, positives)) / max(1, len(positives))
    work = negatives.work(batch_size, num_positives)
    texts = work.scored * len(table) / num_labels / num_processes
    embeddings = 2 * 4 * (encoder.get_embedding_dimension() or 0) * texts
    scores = min(getattr(loss, "memory_budget", 0), 4 * batch_size * work.scored / num_processes)
    twice = "" if not work.embedded_twice else f" ({work.embedded_twice:.0f} of them twice)"
    refreshed = f", refreshes {work.refreshed} in the label bank" if work.refreshed else ""
    bound = "at most " if work.at_most else ""
    sentences = (
        f"Each step scores {_count(batch_size, 'query', 'queries')} on {_count(num_processes, 'process', 'processes')} "
        f"against {bound}{work.scored:.0f} of {num_labels} labels, about {max(0, work.scored - num_positives):.0f} "
        f"negatives per query. Each process embeds {bound}{work.embedded:.0f} label texts per step{twice}{refreshed}, "
        f"and needs about {(embeddings + scores) / 2**20:.3g} MiB for label embeddings, gradients and scores."
    )
    temperature = float(getattr(loss, "temperature", 0))
    if roles.normalises(encoder) and temperature >= 0.5:
        sentences += (
            f" The encoder normalises its embeddings, so scores lie between -{1 / temperature:.1f} and "
            f"{1 / temperature:.1f}, too close together to learn from: use a temperature of about 0.05."
        )
    return sentences


def describe_settings(args: XMCTrainingArguments, word_factor: float) -> str:
    """Return sentences on the rates of word and label vectors, and on the queries that vote, each after a blank."""
    sentences = ""
    if word_factor != 1:
        sentences += f" Word vectors learn at {word_factor:.3g} times the learning rate."
    if args.word_rarity:
        sentences += (
            f" Tokens learn at rates of their inverse document frequency to the power of {args.word_rarity:.3g}."
        )
    if args.label_vectors:
        sentences += f" A vector for each label learns at {args.label_vectors:.3g} times the learning rate."
    if args.vote_loss:
        first = f" After {args.vote_start:.0%} of the steps, each" if args.vote_start else " Each"
        sentences += f"{first} process also embeds up to {args.vote_queries} training queries per step, which vote."
    return sentences


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


class StepSummary(TrainerCallback):
    """Shows ``trainer.describe_step()`` once at the start of a training, on the first process.

    The line goes to the log at level INFO. If that level is off, as it is by default, the line goes to stderr, above
    the progress bar. ``trainer.remove_callback(StepSummary)`` removes it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the line."""
        if not state.is_world_process_zero:
            return
        sentence = self.trainer.describe_step()
        if logger.isEnabledFor(logging.INFO):
            logger.info(sentence)
        else:
            tqdm.write(sentence, file=sys.stderr)
