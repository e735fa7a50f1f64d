"""The weight of each word of a text in the score of a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.encoders.characters import Span
from hf_xmc.encoders.roles import prompt_of
from hf_xmc.encoders.word_parts import parts_of, word_spans

AT_ONCE = 256  # shortened texts that are embedded at a time
NEAR = 1e-2  # relative; half precision rounds an embedding


class WordWeight(NamedTuple):
    """A word, or a pair of neighbouring words, and what it adds to the label score."""

    text: str
    start: int  # its first character in the text that is explained
    end: int  # the character after its last; the prompt of the encoder has no character in the text: start = end = 0
    weight: float


class WordWeights(NamedTuple):
    """The words of a text in their order."""

    words: tuple[WordWeight, ...]
    exact: bool  # whether the weights add up to the label score


def weigh_words(
    encoder: SentenceTransformer,
    embed: Callable[[Sequence[str]], Tensor],
    text: str,
    label: Tensor,
    long_text: str = "truncate",
) -> WordWeights:
    r"""Weigh the words of a text by what they add to the score of a label.

    A static encoder embeds a text as the mean of the vectors :math:`v_t` of its :math:`n` tokens, scaled by some
    :math:`c`. A word then adds :math:`\frac{c}{n} \sum_t v_t \cdot l` over its tokens, and the weights add up to the
    score. An unknown token, and a word that is not read, add zero. Pairs of neighbouring words have entries of their
    own if the encoder reads pairs; so have words that the tokenizer does not split.

    For any other encoder, the weight of a word is the score of the text minus the score of the text without this
    word. These differences do not add up to the score. They take one embedding per word.

    Args:
        encoder: The encoder.
        embed: Embeds ``N`` queries as ``(N, D)``, so that dot products with labels are scores.
        text: A text that does not embed to zero.
        label: ``(T, D)``, the embeddings of the texts of the label, which scores as the best of them.
        long_text: How texts are read that are longer than the encoder reads, as in :class:`hf_xmc.XMCModel`.
    """
    label, query = label.double().cpu(), embed([text])[0].double()
    scores = label @ query
    parts = parts_of(encoder, text, long_text)
    if parts is not None:
        mean = parts.vectors[:, : len(query)].sum(0)  # `truncate_dim` may leave the first dimensions only
        scale = (query @ mean) / (mean @ mean)
        if torch.isfinite(scale) and (query - scale * mean).norm() <= NEAR * query.norm():
            weights = scale * (parts.vectors[:, : len(query)] @ label[scores.argmax()])
            return WordWeights(_named(encoder, text, dict(zip(parts.spans, weights.tolist(), strict=True))), True)
    spans = word_spans(text)
    shortened = [_without(text, span) for span in spans]
    pieces = [embed(shortened[start : start + AT_ONCE]) for start in range(0, len(shortened), AT_ONCE)]
    without = torch.cat(pieces).double() @ label.T
    lost = scores.max() - without.max(1).values
    return WordWeights(_named(encoder, text, dict(zip(spans, lost.tolist(), strict=True))), False)


def _named(encoder: SentenceTransformer, text: str, weights: dict[Span, float]) -> tuple[WordWeight, ...]:
    """Return a weight for each span and, with a weight of zero, for each word that no span touches."""
    weights = dict(weights)
    touched = np.zeros(len(text) + 1, dtype=bool)
    for start, end in weights:
        touched[start:end] = True
    weights |= {(start, end): 0.0 for start, end in word_spans(text) if not touched[start:end].any()}
    prompt = prompt_of(encoder, "query") or ""
    return tuple(
        WordWeight(text[start:end] if end else prompt, start, end, weight)
        for (start, end), weight in sorted(weights.items())
    )


def _without(text: str, span: Span) -> str:
    before, after = text[: span[0]], text[span[1] :]
    return before + (after.lstrip() if not before or before[-1].isspace() else after)
