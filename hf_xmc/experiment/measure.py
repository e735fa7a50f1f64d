"""Memory, calibration and metrics of a trained model, from its validation and test queries."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hf_xmc.data.dataset import XMCData
from hf_xmc.evaluator import XMCEvaluator
from hf_xmc.experiment.intervals import FEW, Answers, add_intervals, answers_of, num_labelled
from hf_xmc.experiment.settings import ExperimentSettings
from hf_xmc.experiment.splits import has_labels, has_propensity, split_to_measure
from hf_xmc.metrics.calibration import choose_threshold, expected_calibration_error, scores_and_hits
from hf_xmc.metrics.frequency import PROPENSITY_PRESETS, by_frequency_decile, inverse_propensity, label_counts
from hf_xmc.model.answers import MAX_LABELS
from hf_xmc.model.model import XMCModel
from hf_xmc.model.own_votes import overlap_expected
from hf_xmc.topk import TopK

logger = logging.getLogger(__name__)

FEWEST = 10  # with fewer validation queries, a model is not calibrated
PRECISIONS = (0.7, 0.8, 0.9)  # for which thresholds are chosen


@overlap_expected()  # validation is remembered, and its own votes are left out on purpose
def complete(
    model: XMCModel, full: XMCData, data: XMCData, settings: ExperimentSettings, again: XMCModel | None = None
) -> dict[str, Any]:
    """Add memory and calibration to a trained model, as far as the data allow, and return the metrics.

    ``labels`` and ``memory`` in them are the metrics of the model without and with its memory. They rank labels as
    ``predict`` does: by probability if the model is calibrated, which matters for new labels alone. The calibration is
    that of the model with its memory. So next to ``memory``, ``labels`` ranks by scores, as ``predict`` does if the
    saved model is loaded without its memory and calibration.

    Args:
        model: The trained model.
        full: The data as they were loaded.
        data: The same data with a validation split taken from train, or ``full`` itself.
        settings: The settings.
        again: A model that was trained on ``full``. It gets the settings and the calibration of ``model``, which does
            not know the validation queries, and is the one that is measured, on test.
    """
    split = split_to_measure(data)
    measured = data if split == "validation" else full
    last = model if again is None else again
    measure = partial(evaluate, last, measured, propensity=settings.propensity)
    by_labels = measure(split) if split is not None and settings.memory else None
    tuned = add_memory(model, data, settings) if settings.memory else None
    if settings.memory and data is not full:
        assert data.validation is not None  # taken from train
        model.remember(data.validation)  # before calibrating, which excludes the votes of these texts for themselves
    thresholds, refused = calibrate(model, data)
    if again is not None:
        if settings.memory:
            again.remember(full.train)
        again.take_settings(model)
    asked = None if split is None or refused else answers_of(last, measured, split)
    metrics = {} if split is None else measure(split, answers=asked)
    if by_labels is not None:
        metrics |= {"labels": by_labels["labels"], "memory": metrics["labels"]}
    if settings.memory:
        metrics["memory_settings"] = tuned
    if refused:
        metrics["not_calibrated"] = refused
    elif asked is not None and split is not None:
        metrics["calibration"] = measure_calibration(last, asked, split, thresholds)
        metrics["calibration"]["validation_queries"] = number = num_labelled(data.relevance("validation"))
        if number < FEW:
            validation = asked if split == "validation" else answers_of(model, data, "validation")
            add_intervals(metrics["calibration"], last, validation, asked)
    return metrics


def add_memory(model: XMCModel, data: XMCData, settings: ExperimentSettings) -> dict[str, Any]:
    """Remember the training queries, with settings chosen on validation if possible, and return the settings."""
    model.remember(data.train)
    try:
        if not has_labels(data, "validation"):
            raise ValueError("there are no validation queries with labels.")
        a, b = PROPENSITY_PRESETS[settings.propensity]
        rarity = inverse_propensity(data.label_counts(), len(data.train), a, b) if has_propensity(data) else None
        return model.tune_memory(
            data.split("validation"),
            metric=settings.memory_metric,
            inverse_propensity=rarity,
            tolerance=0.0 if rarity is None else settings.memory_tolerance,
            exclude=data.filter_pairs.get("validation"),
        )
    except ValueError as error:
        logger.warning("The memory is not tuned and keeps its settings: %s", error)
        assert model.memory is not None
        return asdict(model.memory.settings)


def calibrate(model: XMCModel, data: XMCData) -> tuple[dict[float, float], str]:
    """Calibrate on validation if it is large enough, and return the thresholds by precision.

    The second value is the reason why the model is not calibrated, or an empty string.
    """
    exclude = data.filter_pairs.get("validation")
    number = num_labelled(data.relevance("validation")) if data.validation is not None else 0
    try:
        if number < FEWEST:
            raise ValueError(
                f"calibration needs at least {FEWEST} validation queries with labels, got {number}. Add validation "
                "queries, or raise `validation_size`."
            )
        model.calibrate(data.split("validation"), exclude=exclude)
    except ValueError as error:
        logger.warning("The scores are not calibrated, and no thresholds are chosen: %s", error)
        return {}, str(error)
    thresholds, out_of_reach = dict[float, float](), dict[float, ValueError]()
    answers = answers_of(model, data, "validation")
    for wanted in PRECISIONS:  # as `XMCModel.threshold_for` does, with a single search
        try:
            thresholds[wanted] = choose_threshold(answers.said, answers.relevance, precision=wanted)
        except ValueError as error:
            out_of_reach[wanted] = error
    if out_of_reach:
        precisions = ", ".join(map(str, out_of_reach))
        logger.warning("No threshold for a precision of %s: %s", precisions, next(iter(out_of_reach.values())))
    return thresholds, ""


def measure_calibration(
    model: XMCModel, measured: Answers, split: str, thresholds: dict[float, float]
) -> dict[str, Any]:
    """Return ECE@5 before and after calibration, and the precision at the thresholds, on a split.

    Before calibration, a mixed score is read as a log probability, and a label score as a logit.
    """
    assert model.calibration is not None
    found, relevance, said, _ = measured
    first, hits = scores_and_hits(TopK(found.label_ids[:, :5], found.scores[:, :5]), relevance)
    before = 1 / (1 + np.exp(-first)) if model.memory is None else np.exp(np.minimum(first, 0))
    probabilities, right = scores_and_hits(said, relevance)
    reached = []
    for wanted, threshold in thresholds.items():
        kept = probabilities >= threshold
        precision = right[kept].mean() if kept.any() else None
        about = {"wanted": wanted, "threshold": threshold, "precision": precision}
        reached.append({**about, "labels_per_text": kept.sum() / relevance.shape[0]})
    return {
        "split": split,
        "labels_of_a_text": MAX_LABELS,
        "ECE@5 before": expected_calibration_error(before, hits),
        "ECE@5": expected_calibration_error(*scores_and_hits(TopK(*(part[:, :5] for part in said)), relevance)),
        "thresholds": reached,
    }


def evaluator_of(data: XMCData, split: str, propensity: str) -> XMCEvaluator:
    """Return the evaluator of a split, without PSP@k if there are too few training queries."""
    if has_propensity(data):
        return XMCEvaluator.from_data(data, split, propensity=propensity)
    texts, pairs = data.split(split)["text"][:], data.filter_pairs.get(split)
    return XMCEvaluator(texts, data.relevance(split), data.labels, filter_pairs=pairs)


def evaluate(
    model: XMCModel, data: XMCData, split: str, propensity: str, answers: Answers | None = None
) -> dict[str, Any]:
    """Return the metrics on a split, of all labels and by label frequency, for the labels that ``predict`` returns.

    ``answers`` of the model for the split save a search, unless there are new labels.
    """
    evaluator = evaluator_of(data, split, propensity)
    if answers is None or answers.has_new:
        found = model.search(
            evaluator.texts,
            evaluator.max_k,
            leave_one_out=split != "test",  # validation may be remembered
            exclude=evaluator.filter_pairs,
            probabilities=model.calibration is not None,
        )
    else:  # the same labels
        found = TopK.empty(len(evaluator.texts), max(evaluator.max_k, MAX_LABELS))
        found.label_ids[:, : answers.said.label_ids.shape[1]] = answers.said.label_ids
    metrics = evaluator.score(found)
    size = {name: metrics.pop(name) for name in ("num_queries", "num_empty")}
    deciles = []
    if np.count_nonzero(label_counts(evaluator.relevance)) >= 10:
        deciles = by_frequency_decile(found.label_ids, evaluator.relevance, data.label_counts())
    return {"split": split, **size, "labels": metrics, "deciles": [decile._asdict() for decile in deciles]}
