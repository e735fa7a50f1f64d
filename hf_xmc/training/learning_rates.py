"""Learning rates that a sampled gradient asks for."""

from __future__ import annotations

import copy
import logging
import re

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.gradient_cache import parameters_reached
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.negatives import AllLabels, MinedNegatives

logger = logging.getLogger(__name__)


def word_factor(tokens: np.ndarray, share: float) -> float:
    r"""Return how many times slower Adam moves word vectors, on average, if only a share of the labels is drawn.

    A gradient :math:`g` that is there with probability :math:`p`, and then counts :math:`1 / p` times, is :math:`g` on
    average, but its mean square is :math:`g^2 / p`. Adam divides the one by the root of the other: it goes
    :math:`\sqrt{p}` as far as with :math:`g` in each step. A word that :math:`n` labels have is drawn with
    :math:`p = 1 - (1 - \text{share})^n`; the factor is one over the mean of :math:`\sqrt{p}` over the words of labels.
    All other parameters have a gradient from every label that is drawn.

    Args:
        tokens: those of all labels, one after another.
        share: of the labels, in (0, 1].

    >>> round(word_factor(np.array([7, 8, 8]), 0.25), 3)  # p = 1/4 and 7/16
    1.722
    """
    labels = np.bincount(tokens)
    return float(1 / np.sqrt(1 - (1 - share) ** labels[labels > 0]).mean())


def with_words(
    args: XMCTrainingArguments,
    trained: nn.Module,
    encoder: nn.Module,
    negatives: AllLabels | LabelBank | MinedNegatives,
) -> XMCTrainingArguments:
    """The arguments with a rate for the word vectors of transformers, where labels are drawn and the optimizer is Adam.

    It is :func:`word_factor` times the rate of other parameters, and a log line says so. Vectors of words that only
    queries pass keep that, and those that ``learning_rate_mapping`` names have the rate it gives.

    Args:
        args: left as they are.
        trained: the module whose parameters are trained.
        encoder: what embeds labels.
        negatives: which labels take part in a step; of :class:`MinedNegatives` no share is known.
    """
    share = None if isinstance(negatives, MinedNegatives) else negatives.share
    if share in (None, 1) or "adam" not in OptimizerNames(args.optim).value:
        return args
    reached = {id(weight) for weight in parameters_reached(encoder, negatives.table.features(np.array([0])))}
    words = {id(weight) for model in _innermost_models(encoder) for weight in model.get_input_embeddings().parameters()}
    given = args.learning_rate_mapping
    assert isinstance(given, dict)  # the arguments have parsed it
    names = [name for name, weight in trained.named_parameters() if id(weight) in words & reached]
    names = [name for name in names if not any(re.search(pattern, name) for pattern in given)]
    if not names:
        return args
    factor = word_factor(negatives.table.tokens, share)
    logger.warning(
        "The vectors of words have %.2f times the learning rate of other parameters, %.2g, since only a share of the "
        "labels is drawn. `learning_rate_mapping` can give another.",
        factor,
        factor * args.learning_rate,
    )
    args = copy.copy(args)
    args.learning_rate_mapping = {f"^{re.escape(name)}$": factor * args.learning_rate for name in names} | given
    return args


def _innermost_models(encoder: nn.Module) -> list[PreTrainedModel]:
    """Return the transformers models that contain no other.

    A model of several towers, such as CLIP, has word vectors only in its towers."""
    models = [module for module in encoder.modules() if isinstance(module, PreTrainedModel)]
    return [model for model in models if sum(isinstance(module, PreTrainedModel) for module in model.modules()) == 1]
