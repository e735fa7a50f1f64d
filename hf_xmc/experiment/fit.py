"""The training of an experiment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_xmc.data.dataset import XMCData
from hf_xmc.distributed import from_first
from hf_xmc.encoders.phrases import with_phrases
from hf_xmc.evaluator import XMCEvaluator
from hf_xmc.experiment import encoders
from hf_xmc.experiment.defaults import choose
from hf_xmc.experiment.measure import evaluator_of
from hf_xmc.experiment.progress import show_progress
from hf_xmc.experiment.settings import MADE, ExperimentSettings
from hf_xmc.experiment.splits import has_labels
from hf_xmc.hub.self_contained import check_encoder
from hf_xmc.metrics.frequency import PROPENSITY_PRESETS
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.classifiers import add_classifiers
from hf_xmc.training.mining import HardNegativeMiner
from hf_xmc.training.trainer import XMCTrainer

logger = logging.getLogger(__name__)

BuildEncoder = Callable[[ExperimentSettings, XMCData, int], SentenceTransformer]
BuildLoss = Callable[[ExperimentSettings], torch.nn.Module]


class Fitted(NamedTuple):
    """A trainer after training, the vectors of the labels, the training time in seconds, and the complete settings.

    Only the first process adds classifiers to the encoder and the vectors.
    """

    trainer: XMCTrainer
    vectors: Tensor | None
    seconds: float
    settings: ExperimentSettings


def fit(
    settings: ExperimentSettings,
    args: XMCTrainingArguments,
    data: XMCData,
    *,
    build_encoder: BuildEncoder = encoders.build_encoder,
    build_loss: BuildLoss = encoders.build_loss,
    given: frozenset[str] | None = None,
) -> Fitted:
    """Train an encoder.

    Args:
        settings, args: The settings, and the training arguments.
        data: The data, with an optional validation split.
        build_encoder: Function that makes the encoder from the settings, the data in the encoder's form, and the seed.
        build_loss: Function that makes the loss from the settings.
        given: Names of the training arguments that were given; the others may be chosen to fit the encoder and the
            data. ``None`` keeps all of them.

    Raises:
        ValueError: if a setting is invalid or the encoder cannot be saved, before the first step.
    """
    read = with_phrases(data) if settings.model == "phrases" else data  # texts in the form for training
    if settings.rarity:
        read = read.weight_positives(settings.rarity, *PROPENSITY_PRESETS[settings.propensity])
    evaluator = None
    if has_labels(read, "validation"):
        evaluator = evaluator_of(read, "validation", settings.propensity)
        _check_metric(args, evaluator)
    else:
        _turn_evaluation_off(args)
    encoder = build_encoder(settings, read, args.seed)
    settings = choose(settings, args, given, read, encoder)
    if build_encoder is not encoders.build_encoder or settings.model not in MADE:  # ours can be saved
        from_first(lambda: check_encoder(encoders.plain(encoder, settings)))  # only the first process saves
    trainer = XMCTrainer(
        encoder,
        args,
        read.train,
        labels=read.labels,
        loss=build_loss(settings),
        evaluator=evaluator,
    )
    if args.label_mode == "mined" and args.num_hard_negatives:
        trainer.add_callback(HardNegativeMiner(trainer, start=settings.mining_start, every=settings.mining_every))
    show_progress(trainer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    vectors = trainer.label_vectors()
    if settings.classifiers and trainer.is_world_process_zero():
        logger.info("Linear classifiers of %d labels are fitted.", read.num_labels)
        vectors = add_classifiers(encoder, trainer.train_dataset, read.num_labels, vectors)
    return Fitted(trainer, vectors, time.perf_counter() - start, settings)


def _check_metric(args: XMCTrainingArguments, evaluator: XMCEvaluator) -> None:
    """Raise if checkpoints are compared by a metric that the evaluator does not compute."""
    metric, names = args.metric_for_best_model, evaluator.metric_names
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise ValueError(f"`metric_for_best_model` must be one of {', '.join(names)}, got {metric!r}.")


def _turn_evaluation_off(args: XMCTrainingArguments) -> None:
    """Train without evaluation and keep the last weights, for lack of validation queries with labels."""
    if args.eval_strategy != IntervalStrategy.NO or args.load_best_model_at_end:
        logger.warning(
            "There are no validation queries with labels, so training has no evaluation and keeps the last weights."
        )
    args.eval_strategy, args.do_eval, args.eval_on_start = IntervalStrategy.NO, False, False
    args.load_best_model_at_end, args.metric_for_best_model = False, None
    if args.save_strategy == SaveStrategy.BEST:
        args.save_strategy = SaveStrategy.EPOCH
