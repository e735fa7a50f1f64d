"""Make the negatives that a ``label_mode`` stands for, and save and load their state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from hf_xmc import distributed
from hf_xmc.encoders import roles
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.arguments import LabelMode, XMCTrainingArguments
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.checks import check_sparse_updates
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.label_vectors import LabelVectors
from hf_xmc.training.mined_negatives import MinedNegatives
from hf_xmc.training.negatives import Negatives
from hf_xmc.training.sampled_labels import SampledLabels

logger = logging.getLogger(__name__)

EXACT_TOKENS = 16_384  # two chunks of labels
SAMPLED_LABELS = 1_000  # fewer labels cost a static encoder little in label_mode `exact`
STATE = "negatives-{rank}.safetensors"


def make_negatives(
    make: Callable[[TokenizedLabels], Negatives] | None,
    table: TokenizedLabels,
    loss: nn.Module,
    num_queries: int,
    args: XMCTrainingArguments,
    vectors: LabelVectors | None = None,
) -> Negatives:
    """Return the negatives of ``args.label_mode``, or the user's own.

    Args:
        make: A function that makes the user's own negatives; ``None`` for those of ``label_mode``.
        table: The tokenized labels, with their encoder.
        loss: The loss that is trained.
        num_queries: Number of training queries.
        args: The training arguments.
        vectors: The vectors of the labels, if any.

    Raises:
        ValueError: if ``make`` and ``label_mode`` are both given, or the mode is ``bank`` or ``sampled`` and the loss
            does not support label weights.
    """
    if make is not None:
        if args.label_mode is not None:
            raise ValueError(
                f"label_mode must be None if `negatives` are given, got {args.label_mode!r}: each of them selects the "
                "labels of a step. Leave one of them out."
            )
        return make(table)
    if args.label_mode is None and _would_sample(table, loss, args):
        logger.info(
            "Each step scores all %d labels. A static encoder trains much faster on a sample of them: set "
            "label_mode='sampled' and sparse_updates=True, as `hf_xmc.train` does from %d labels on.",
            table.num_labels,
            SAMPLED_LABELS,
        )
    mode = args.label_mode or default_label_mode(table)
    normalised = roles.normalises(table.encoder)
    if mode == "mined":
        numbers = args.num_hard_negatives, args.num_random_negatives
        return MinedNegatives(table, num_queries, *numbers, own_labels_only=vectors is not None)
    if mode in ("bank", "sampled"):
        if not getattr(loss, "supports_label_weights", False):
            raise ValueError(
                f"label_mode `{mode}` needs a loss that supports label weights, got {type(loss).__name__}. Use "
                "DecoupledSoftmaxLoss or SoftmaxLoss, or label_mode `fresh`."
            )
        if mode == "sampled":
            return SampledLabels(table, args.label_sample_fraction, normalised)
        return LabelBank(table, loss, args.label_sample_fraction, args.label_bank_max_age, normalised, vectors)
    return AllLabels(table, None if mode == "exact" else args.label_sample_fraction, normalised)


def default_label_mode(table: TokenizedLabels) -> LabelMode:
    """Return the label mode of an encoder and its labels: ``exact`` if that is affordable, and ``fresh`` otherwise.

    It is affordable for a static encoder, which looks tokens up, and for labels of at most ``EXACT_TOKENS`` tokens.
    """
    static = isinstance(table.encoder[0], StaticEmbedding)
    return "exact" if static or table.lengths.sum() <= EXACT_TOKENS else "fresh"


def _would_sample(table: TokenizedLabels, loss: nn.Module, args: XMCTrainingArguments) -> bool:
    """Return whether ``sampled`` with ``sparse_updates`` is possible, saves time, and is not in use.

    It is not the default: the updates ignore a given optimizer, and the mode is less precise.
    """
    if args.sparse_updates or table.num_labels < SAMPLED_LABELS:
        return False
    try:
        check_sparse_updates(args, table.encoder)
    except ValueError:
        return False
    return isinstance(table.encoder[0], StaticEmbedding) and bool(getattr(loss, "supports_label_weights", False))


def save_negatives(negatives: Negatives, folder: Path) -> None:
    """Write the state of this process into a checkpoint."""
    if state := negatives.state_dict():
        save_file(state, folder / STATE.format(rank=distributed.rank()))


def load_negatives(negatives: Negatives, folder: Path) -> None:
    """Restore the state of this process from a checkpoint.

    Raises:
        ValueError: if the checkpoint does not have it.
    """
    if negatives.saving_rank is None:
        return
    path = folder / STATE.format(rank=negatives.saving_rank)
    if not path.exists():
        raise ValueError(
            f"{folder} has no {path.name}: it was saved with another label_mode or by fewer processes. Resume with the "
            "settings of the first run."
        )
    negatives.load_state_dict(load_file(path))
