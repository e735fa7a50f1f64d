"""Derive missing settings and training arguments from the encoder and the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from hf_xmc.data.dataset import XMCData
from hf_xmc.encoders import roles
from hf_xmc.experiment.settings import FEW_TEXTS, MADE, ExperimentSettings
from hf_xmc.experiment.splits import has_labels
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.classifiers import can_hold_classifiers
from hf_xmc.training.defaults import arguments_for, log_chosen, rule_for
from hf_xmc.training.label_modes import SAMPLED_LABELS

VALIDATION_SHARE, VALIDATION_QUERIES, VALIDATION_LIMIT = 0.02, 100, 0.1
REFIT_QUERIES, REFIT_LIMIT = 400, 0.2  # of validation, which costs no training queries then
CLASSIFIED_LABELS = 250  # at most, by default
EPOCHS = {"fast": {True: 4, False: 1}, "best": {True: 12, False: 6}}  # of a static encoder, and of others
SAMPLED_RATE = {"fast": 0.08, "default": 0.06, "best": 0.06}
SAMPLED_EPOCHS, FEW_QUERIES = 4, 25_000  # twice as many epochs, except in `fast`, for fewer queries
SAMPLED_FRACTION = {"fast": 0.05, "default": 0.1, "best": 0.2}
LABEL_VECTORS = 0.25  # for a static encoder
VOTE_LOSS = 0.5  # for a static encoder with a memory
VOTE_START = 0.5  # from FEW_QUERIES on; with fewer queries, the votes are trained from the first step on
SAMPLED_LOSSES = ("decoupled_softmax", "softmax")
SAMPLED_EXCLUDES = {"label_mode", "sparse_updates", "optim", "optim_args", "weight_decay", "fp16"}
LENGTH_SAMPLE, LENGTH_QUANTILE, LENGTH_STEP = 2000, 0.99, 16


def refits(settings: ExperimentSettings, data: XMCData) -> bool:
    """Return whether to train once more on train and validation, after memory and calibration are tuned.

    Raises:
        ValueError: if the settings ask for it, and it is impossible.
    """
    missing = "a test split with labels" if not has_labels(data, "test") else ""
    if data.validation is not None or settings.validation_size == 0:
        missing = "validation queries that are taken from train"
    if PartialState().num_processes > 1:
        missing = "a single process"
    if settings.refit and missing:
        raise ValueError(f"`refit` needs {missing}. Leave it out, or set it to False.")
    small = settings.model in MADE and len(data.train) < FEW_TEXTS
    return not missing and (small if settings.refit is None else settings.refit)


def validation_size(settings: ExperimentSettings, data: XMCData) -> float:
    """Return the fraction of train for validation: 0.02, or 100 queries if that is more, up to a tenth.

    With a refit, it is 400 queries, up to a fifth.
    """
    if settings.validation_size is not None:
        return settings.validation_size
    queries, limit = (REFIT_QUERIES, REFIT_LIMIT) if settings.refit else (VALIDATION_QUERIES, VALIDATION_LIMIT)
    return max(VALIDATION_SHARE, min(queries / max(1, len(data.train)), limit))


def fits_classifiers(settings: ExperimentSettings, data: XMCData, encoder: SentenceTransformer) -> bool:
    """Return whether to fit linear classifiers of the labels after training.

    Raises:
        ValueError: if the settings ask for classifiers, and the encoder cannot hold them.
    """
    possible = can_hold_classifiers(encoder)
    if settings.classifiers and not possible:
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise ValueError(
            "`classifiers` needs a static encoder that does not normalise or truncate its embeddings, got the modules "
            f"{modules} and truncate_dim={encoder.truncate_dim}. Leave it out."
        )
    small = settings.model in MADE and len(data.train) < FEW_TEXTS and data.num_labels <= CLASSIFIED_LABELS
    return possible and (small if settings.classifiers is None else settings.classifiers)


def choose(
    settings: ExperimentSettings,
    args: XMCTrainingArguments,
    given: frozenset[str] | None,
    data: XMCData,
    encoder: SentenceTransformer,
) -> ExperimentSettings:
    """Choose missing settings, also in ``args`` and ``encoder``, and return the complete settings.

    One log line names the chosen settings.

    Args:
        settings: The settings.
        args: The training arguments, which are changed.
        given: Names of the arguments to leave unchanged; ``None`` for all.
        data: The data to train on.
        encoder: The encoder before training, whose maximum length is changed.

    Raises:
        ValueError: if the settings ask for classifiers, and the encoder cannot hold them.
    """
    static = isinstance(encoder[0], StaticEmbedding)
    chosen: dict[str, tuple[Any, str]] = {}
    if settings.temperature is None:
        unit = roles.normalises(encoder)
        chosen["temperature"] = (0.05, "scores are cosines") if unit else (1.0, "embeddings are not normalised")
    if settings.max_seq_length is None and not static and (length := _max_length(encoder, data)):
        chosen["max_seq_length"] = (length, f"{LENGTH_QUANTILE:.0%} of the texts are no longer")
        encoder.max_seq_length = length
    found: dict[str, Any] = {name: value for name, (value, _) in chosen.items()}
    found["classifiers"] = fits_classifiers(settings, data, encoder)
    why = f"{len(data.train)} training queries, {data.num_labels} labels"
    chosen |= {"classifiers": (True, why)} if found["classifiers"] and settings.classifiers is None else {}
    if given is not None:
        epochs = EPOCHS.get(settings.preset, {}).get(static)
        arguments = arguments_for(encoder, args, len(data.train), given, epochs)
        if "num_train_epochs" in arguments:
            number, kind = arguments["num_train_epochs"]
            arguments["num_train_epochs"] = number, f"preset {settings.preset}, {kind}"
        if static and settings.loss in SAMPLED_LOSSES:
            arguments |= _sampled(settings, args, given, len(data.train), data.num_labels)
            arguments["label_vectors"] = (LABEL_VECTORS, rule_for(encoder).kind)
            if settings.memory and settings.preset != "fast":
                arguments["vote_loss"] = (VOTE_LOSS, f"{rule_for(encoder).kind} with a memory")
                if len(data.train) >= FEW_QUERIES:
                    arguments["vote_start"] = (VOTE_START, "as good as from the start, and faster")
        if args.max_steps > 0:
            arguments.pop("num_train_epochs", None)
        for name, (value, why) in arguments.items():
            if name not in given:
                setattr(args, name, value)
                chosen[name] = value, why
    if settings.loss_dtype == "auto":
        low = args.label_mode == "sampled" and args.device.type == "cpu" and multiplies_bfloat16()
        found["loss_dtype"] = "bfloat16" if low else "float32"
        if low:
            chosen["loss_dtype"] = "bfloat16", "this CPU multiplies it fast"
    log_chosen(chosen)
    return replace(settings, **found)


def _sampled(
    settings: ExperimentSettings, args: XMCTrainingArguments, given: frozenset[str], num_queries: int, num_labels: int
) -> dict[str, tuple[Any, str]]:
    """Return the arguments that train on a sample of the labels, if that is possible and saves time."""
    if given & SAMPLED_EXCLUDES or num_labels < SAMPLED_LABELS:
        return {}
    if args.world_size > 1 and args.device.type != "cpu":
        return {"label_mode": ("exact", "several GPUs, which do not add up sparse gradients")}
    why, sample = f"a static encoder, {num_labels} labels", "a sample of the labels"
    preset = f"preset {settings.preset}, {sample}"
    few = num_queries < FEW_QUERIES and settings.preset != "fast"
    return {
        "label_mode": ("sampled", why),
        "sparse_updates": (True, why),
        "label_sample_fraction": (SAMPLED_FRACTION[settings.preset], preset),
        "learning_rate": (SAMPLED_RATE[settings.preset], preset),
        "num_train_epochs": (2 * SAMPLED_EPOCHS, f"{preset}, few queries") if few else (SAMPLED_EPOCHS, preset),
    }


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch 2.13 has no public names for them
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _max_length(encoder: SentenceTransformer, data: XMCData) -> int | None:
    """Return the maximum length of nearly all texts, in tokens, if it is below the encoder's limit."""
    limit = encoder.max_seq_length
    if limit is None:
        return None
    lengths = [_token_counts(encoder, texts) for texts in (data.train["text"], data.labels["text"])]
    longest = max(float(np.quantile(counts, LENGTH_QUANTILE)) for counts in lengths if len(counts))
    length = int(np.ceil(longest / LENGTH_STEP) * LENGTH_STEP)
    return length if length < limit else None


def _token_counts(encoder: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """Return the lengths in tokens of an evenly spaced sample of texts, cut to the maximum of the encoder."""
    rows = np.unique(np.linspace(0, max(0, len(texts) - 1), LENGTH_SAMPLE).astype(int))[: len(texts)]
    sample = [texts[int(row)] for row in rows]
    return np.array([int(encoder.preprocess([text])["attention_mask"].sum()) for text in sample])
