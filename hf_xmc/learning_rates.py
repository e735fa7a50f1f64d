"""Learning rates that a sampled gradient asks for."""

from __future__ import annotations

import re

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from hf_xmc.batching import LabelTable
from hf_xmc.encoding import parameters_reached


def word_factor(tokens: np.ndarray, share: float) -> float:
    r"""How many times slower Adam moves the vectors of words, on average, when only a share of the labels is drawn.

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


def of_words(trained: nn.Module, encoder: nn.Module, table: LabelTable, share: float, rate: float) -> dict[str, float]:
    """For ``learning_rate_mapping``: the rate of the word vectors of transformers, by a pattern of their names.

    Args:
        trained: the module whose parameters they are.
        encoder: what embeds labels. Vectors of words that only queries pass are not in the mapping.
        table: the tokenised labels.
        share: of the labels, how many are drawn.
        rate: of all other parameters.
    """
    reached = {id(weight) for weight in parameters_reached(encoder, table.features(np.array([0])))}
    modules = [module for module in encoder.modules() if isinstance(module, PreTrainedModel)]
    words = {id(weight) for module in modules for weight in module.get_input_embeddings().parameters()}
    names = [name for name, weight in trained.named_parameters() if id(weight) in words & reached]
    return {f"^{re.escape(name)}$": word_factor(table.tokens, share) * rate for name in names}
