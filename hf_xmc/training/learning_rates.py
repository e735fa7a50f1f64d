"""Learning rate of word vectors, whose gradient is sampled."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.gradient_cache import parameters_reached
from hf_xmc.training.negatives import Negatives

logger = logging.getLogger(__name__)


def word_factor(tokens: np.ndarray, fraction: float) -> float:
    r"""Return how many times slower Adam moves word vectors, on average, if only a fraction of the labels is drawn.

    A gradient :math:`g` that is present with probability :math:`p`, and is then multiplied by :math:`1 / p`, has mean
    :math:`g` and mean square :math:`g^2 / p`. Adam divides the mean by the root of the mean square, so each step is
    :math:`\sqrt{p}` times as long as with :math:`g`. A word that occurs in :math:`n` labels is drawn with
    :math:`p = 1 - (1 - \text{fraction})^n`. The factor is one over the mean of :math:`\sqrt{p}` over the words of
    labels. All other parameters receive a gradient from every label that is drawn.

    Args:
        tokens: Token ids of all labels, one label after another.
        fraction: Fraction of the labels that is drawn, in (0, 1].

    >>> round(word_factor(np.array([7, 8, 8]), 0.25), 3)  # p = 1/4 and 7/16
    1.722
    """
    if not len(tokens):  # of an encoder without token ids
        return 1.0
    labels = np.bincount(tokens)
    return float(1 / np.sqrt(1 - (1 - fraction) ** labels[labels > 0]).mean())


def token_rates(texts: Iterable[tuple[np.ndarray, np.ndarray]], num_tokens: int, exponent: float) -> np.ndarray:
    r"""Return the factor of the learning rate of each token's vector, ``(V,)``.

    .. math:: a_t \propto \Big(1 + \ln \frac{1 + N}{1 + n_t}\Big)^{\text{exponent}}

    :math:`n_t` of the :math:`N` texts have token :math:`t`. The mean factor over the tokens of all texts, each counted
    once per text, is 1. A token of no text has the factor 1. The embedding of a text is the mean of its tokens'
    vectors, so in a long text words such as *the* drown the others unless they learn more slowly.

    Args:
        texts: Collections of texts, each as token ids, one text after another, and the number of tokens of each text.
        num_tokens: Number of tokens in the vocabulary.
        exponent: 0 for the same rate for all.

    >>> token_rates([(np.array([0, 1, 0, 2, 0, 0]), np.array([2, 2, 2]))], 4, 1.0).round(2)
    array([0.78, 1.33, 1.33, 1.  ])
    """
    counts, num_texts = np.zeros(num_tokens), 0
    for tokens, lengths in texts:
        owners = np.repeat(np.arange(len(lengths)), lengths)
        counts += np.bincount(np.unique(owners * num_tokens + tokens) % num_tokens, minlength=num_tokens)
        num_texts += len(lengths)
    rates = (1 + np.log((1 + num_texts) / (1 + counts))) ** exponent
    rates *= counts.sum() / max(1e-12, (rates * counts).sum())
    return np.where(counts > 0, rates, 1.0)


def with_word_rate(
    args: XMCTrainingArguments, trained: nn.Module, encoder: nn.Module, negatives: Negatives, table: TokenizedLabels
) -> tuple[XMCTrainingArguments, float]:
    """Return the arguments with a learning rate for word vectors, and the factor by which it exceeds the base rate.

    The factor is ``args.word_learning_rate_factor``. ``"auto"`` stands for :func:`word_factor` if the optimizer is Adam
    and a known fraction of the labels is drawn, and for 1 otherwise. Word vectors that only queries use keep the base
    rate; ``learning_rate_mapping`` takes precedence. Only encoders of transformers have word vectors in this sense.

    Args:
        args: The arguments, which are not changed.
        trained: The module whose parameters are trained.
        encoder: The encoder of labels.
        negatives: The labels of a step.
        table: The tokenized labels.
    """
    factor, fraction = args.word_learning_rate_factor, negatives.sample_fraction
    if factor == "auto":
        sampled = fraction not in (None, 1) and "adam" in OptimizerNames(args.optim).value
        factor = word_factor(table.tokens, fraction) if sampled and fraction is not None else 1.0
    assert isinstance(factor, float | int)  # the arguments have checked it
    if factor == 1:
        return args, 1.0
    reached = {id(weight) for weight in parameters_reached(encoder, table.features(np.array([0])))}
    words = {id(weight) for model in _innermost_models(encoder) for weight in model.get_input_embeddings().parameters()}
    given = args.learning_rate_mapping
    assert isinstance(given, dict)  # the arguments have parsed it
    names = [name for name, weight in trained.named_parameters() if id(weight) in words & reached]
    names = [name for name in names if not any(re.search(pattern, name) for pattern in given)]
    if not names:
        return args, 1.0
    assert args.learning_rate is not None  # the trainer has chosen it
    rate = factor * args.learning_rate
    logger.info(
        "Word vectors (%s) have a learning rate of %.3g, %.3g times that of other parameters. Set "
        "`word_learning_rate_factor` to change it.",
        ", ".join(names),
        rate,
        factor,
    )
    args = copy.copy(args)
    args.learning_rate_mapping = {f"^{re.escape(name)}$": rate for name in names} | given
    return args, factor


def _innermost_models(encoder: nn.Module) -> list[PreTrainedModel]:
    """Return the transformers models that contain no other.

    A multi-tower model such as CLIP has word embeddings only in its towers.
    """
    models = [module for module in encoder.modules() if isinstance(module, PreTrainedModel)]
    return [model for model in models if sum(isinstance(module, PreTrainedModel) for module in model.modules()) == 1]
