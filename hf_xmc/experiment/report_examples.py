"""Example predictions: labels found, right or wrong, labels missed, and the words in favour of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_xmc.data.dataset import XMCData
from hf_xmc.encoders.characters import Span
from hf_xmc.encoders.word_parts import is_static, word_spans
from hf_xmc.model.model import XMCModel
from hf_xmc.model.word_weights import WordWeight

NUM_EXAMPLES, TOP_K = 10, 5
SHOWN_TEXT, SHOWN_LABEL, SHOWN_MISSED, SHOWN_WORDS = 400, 120, 5, 3
MAX_WORDS = 100  # maximum length of a text to explain, if each word takes an embedding


class Piece(NamedTuple):
    """A part of a text, and its contribution to the first label."""

    text: str
    heat: float  # from 0 to 1 for the strongest word


class FoundLabel(NamedTuple):
    """A predicted label."""

    text: str
    right: bool
    probability: float | None  # None if the model is not calibrated
    because: list[str]  # words, strongest first


class Example(NamedTuple):
    """A text with its predicted labels."""

    pieces: list[Piece]
    found: list[FoundLabel]
    missed: list[str]
    num_more_missed: int  # missed labels that are not in `missed`
    num_right: int


def draw_examples(model: XMCModel, data: XMCData, split: str) -> list[Example]:
    """Return ten random texts of a split, with their first five labels.

    A text in the memory does not vote for itself. The split ``test`` needs no such check.
    """
    rows = data.split(split)
    chosen = np.random.default_rng(0).choice(len(rows), min(NUM_EXAMPLES, len(rows)), replace=False)
    sample = rows.select(chosen)
    pairs = data.filter_pairs.get(split, np.empty((0, 2), dtype=np.int64))
    exclude = [(place, label) for place, row in enumerate(chosen) for label in pairs[pairs[:, 0] == row, 1]]
    found = model.search(
        sample["text"][:],
        min(TOP_K, len(model.labels)),
        exclude=np.array(exclude, dtype=np.int64).reshape(-1, 2),
        leave_one_out=split != "test",
        probabilities=model.calibration is not None,
    )
    probabilities = None if model.calibration is None else found.scores
    return [
        _example(model, text, truth, ids[ids >= 0].tolist(), None if probabilities is None else probabilities[place])
        for place, (text, truth, ids) in enumerate(
            zip(sample["text"], sample["label_ids"], found.label_ids, strict=True)
        )
    ]


def _example(
    model: XMCModel, text: str, truth: Sequence[int], found: list[int], probabilities: np.ndarray | None
) -> Example:
    names, uids = model.labels["text"], model.labels["uid"]
    why = _explanations(model, text, [uids[label] for label in found])
    missed = [shorten(names[label], SHOWN_LABEL) for label in truth if label not in found]
    labels = [
        FoundLabel(
            shorten(names[label], SHOWN_LABEL),
            label in truth,
            None if probabilities is None else float(probabilities[place]),
            strongest(why[place]),
        )
        for place, label in enumerate(found)
    ]
    pieces = heat_map(text, why[0] if why else ())
    return Example(pieces, labels, missed[:SHOWN_MISSED], len(missed[SHOWN_MISSED:]), len(set(truth)))


def _explanations(model: XMCModel, text: str, uids: list[str]) -> list[tuple[WordWeight, ...]]:
    """Weigh the words for all labels, or for the first one of a short text if the encoder embeds once per word."""
    short = 0 < len(word_spans(text)) <= MAX_WORDS  # a blank text cannot be explained
    explained = len(uids) if is_static(model.encoder) else int(short)
    words = [model.weigh_words(text, uid).words for uid in uids[:explained]]
    return words + [()] * (len(uids) - len(words))


def strongest(words: Sequence[WordWeight]) -> list[str]:
    """Return up to three words and pairs that add most to the score of a label.

    Punctuation is left out, and so are words and pairs that share a word with a stronger one.

    >>> weights = {"a sloop": 1.5, "sloop": 1.0, "a": 0.2, ",": 2.0, "sail": 0.1}
    >>> strongest([WordWeight(text, 0, 0, weight) for text, weight in weights.items()])
    ['a sloop', 'sail']
    """
    named: list[str] = []
    told: set[str] = set()
    for word in sorted(words, key=lambda word: -word.weight):
        parts = {word.text[start:end].casefold() for start, end in word_spans(word.text)}
        if word.weight > 0 and all(any(map(str.isalnum, part)) for part in parts) and not parts & told:
            named.append(shorten(word.text, 40))
            told |= parts
    return named[:SHOWN_WORDS]


def heat_map(text: str, words: Sequence[WordWeight]) -> list[Piece]:
    """Return a text in pieces, each with its contribution to a score, from 0 to 1 for the strongest word.

    Each word gets half the weight of its pairs. Punctuation and words that lower the score have no heat.
    """
    spans = word_spans(text)
    heat = np.zeros(len(spans))
    starts = np.array([start for start, _ in spans])
    for word in words:
        first, last = np.searchsorted(starts, [word.start, word.end - 1], side="right") - 1
        for place in range(max(0, first), last + 1):
            heat[place] += word.weight / (last - first + 1)
    heat[[not any(map(str.isalnum, text[start:end])) for start, end in spans]] = 0
    heat = np.maximum(0, heat) / max(heat.max(initial=0), 1e-9)
    return _cut(text, spans, heat)


def _cut(text: str, spans: Sequence[Span], heat: np.ndarray) -> list[Piece]:
    pieces: list[Piece] = []
    end = 0
    for (start, stop), value in zip(spans, heat.tolist(), strict=True):
        if stop > SHOWN_TEXT:
            return [*pieces, Piece(text[end:start] + "...", 0.0)]
        if start > end:
            pieces.append(Piece(text[end:start], 0.0))
        pieces.append(Piece(text[start:stop], value))
        end = stop
    return pieces if end == len(text) else [*pieces, Piece(text[end:], 0.0)]


def shorten(text: str, length: int) -> str:
    """Return a text shortened to at most ``length`` characters, with dots if it was longer."""
    return text if len(text) <= length else text[: length - 4] + " ..."
