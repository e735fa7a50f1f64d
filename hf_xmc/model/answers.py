"""Answer a stream of texts block by block, with the labels that a caller asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hf_xmc.data.labels import LabelTexts
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.model.embeddings import BATCH_SIZE, warn_about_unknown
from hf_xmc.model.hierarchy import Hierarchy
from hf_xmc.model.predictions import Prediction, predictions_of
from hf_xmc.model.queries import Found
from hf_xmc.model.reranking import TEXTS_AT_ONCE, Reranking
from hf_xmc.search.places import handicaps
from hf_xmc.topk import TopK, checked_k

logger = logging.getLogger(__name__)

DEFAULT_TOP_K = 5  # labels of a text if neither a number nor a threshold is given
PROGRESS_DELAY = 2.0  # seconds before a progress bar appears
MAX_LABELS = 200  # labels of a text that a threshold chooses from


class Answers(NamedTuple):
    """The labels of a block of texts."""

    labels: list[list[Prediction]]
    num_unknown: int  # texts that hold no token that the encoder knows


class Choice(NamedTuple):
    """The labels of a text that a caller asked for."""

    top_k: int | None
    threshold: float | None
    allow: np.ndarray | None  # label ids; None for all
    roll_up: Callable[[TopK, int], TopK] | None
    num_labels: int  # of the model
    reranking: Reranking | None = None
    new: int | None = None  # places to reserve for new labels

    @classmethod
    def of(
        cls,
        label_texts: LabelTexts,
        top_k: int | None,
        threshold: float | None,
        allow: Iterable[str] | None,
        deny: Iterable[str] | None,
        hierarchy: Hierarchy | None,
        reranking: Reranking | None = None,
        new: int | None = None,
    ) -> Choice:
        """Check arguments of :meth:`hf_xmc.XMCModel.predict` and translate uids into label ids.

        Raises:
            ValueError: if ``top_k``, ``threshold`` or ``new`` is out of range, ``new`` is given with a threshold or a
                reranker, or a uid is unknown.
        """
        top_k = None if top_k is None else checked_k(top_k, "top_k")
        if reranking is not None:
            reranking.check_top_k(top_k, len(label_texts))
        if threshold is not None and (not isinstance(threshold, Real) or not 0 <= threshold <= 1):
            raise ValueError(f"`threshold` must be a probability from 0 to 1, got {threshold!r}.")
        if new is not None:
            _check_new(new, top_k or DEFAULT_TOP_K)
            if threshold is not None or reranking is not None:
                raise ValueError(
                    "`new` must be None with a threshold, which new labels reach by their probability, and with "
                    f"`rerank`, which orders all labels, got {new}."
                )
        visible = None if allow is None and deny is None else label_texts.visible(allow, deny)
        roll_up = None
        if hierarchy is not None:
            rows = label_texts.known_rows(hierarchy.uids)
            if not rows:
                raise ValueError(
                    f"hierarchy must name labels of the model by their uids, got {hierarchy.uids[:1]}, and the model "
                    f"has {label_texts.labels['uid'][:1]}. Is it the hierarchy of these labels?"
                )
            roll_up = partial(hierarchy.roll_up, rows=rows, hidden=None if visible is None else ~visible)
        allowed = None if visible is None else np.flatnonzero(visible)
        return cls(top_k, threshold, allowed, roll_up, len(label_texts), reranking, new)

    @property
    def limit(self) -> int:
        """The maximum number of labels of a text."""
        default = DEFAULT_TOP_K if self.threshold is None else MAX_LABELS
        most = self.num_labels if self.reranking is None else self.num_candidates
        return min(self.top_k or default, most)

    @property
    def num_candidates(self) -> int:
        """The number of labels to search for: those that are shown, or those that are reranked."""
        return self.limit if self.reranking is None else min(self.reranking.top_k, self.num_labels)

    @property
    def may_be_cut(self) -> bool:
        """Whether a text may have more labels above the threshold than are searched for, unasked."""
        return self.top_k is None and self.threshold is not None and self.limit < self.num_labels

    def handicaps(self) -> np.ndarray:
        """Return what new labels need to get each place; with a threshold no place is reserved."""
        return handicaps(self.limit, self.new if self.threshold is None else 0)

    def answers(self, texts: list[str], found: Found, calibration: Calibration | None, labels: Dataset) -> Answers:
        """Return the labels of a block of texts: reranked, calibrated, rolled up and cut, as asked.

        Args:
            texts: ``N`` texts, of which some may be blank.
            found: The :attr:`num_candidates` best labels of each text that is not blank.
            calibration: The map from scores to probabilities, if any.
            labels: A row for each label of the model.
        """
        asked = [number for number, text in enumerate(texts) if text.strip()]
        best = found.labels
        if self.reranking is not None:
            best = self.reranking.apply([texts[number] for number in asked], best, labels)
        if calibration is not None:
            best = TopK(best.label_ids, calibration(best.scores))
        if self.roll_up is not None:
            best = self.roll_up(best, self.limit)
        best = TopK(*(part[:, : self.limit] for part in best))
        predictions: list[list[Prediction]] = [[] for _ in texts]
        for number, predicted in zip(asked, predictions_of(best, labels, self.threshold), strict=True):
            predictions[number] = predicted
        return Answers(predictions, len(texts) - int(found.recognised.sum()))


def _check_new(new: Any, top_k: int) -> None:
    if isinstance(new, bool) or not isinstance(new, int | np.integer) or not 0 <= new <= top_k:
        raise ValueError(f"`new` must be a whole number from 0 to the {top_k} labels of a text (`top_k`), got {new!r}.")


def answer_stream(
    texts: Iterable[str], answer: Callable[[list[str], Choice], Answers], choice: Choice, show_progress_bar: bool | None
) -> Iterator[list[Prediction]]:
    """Yield the labels of each text, and warn at the end about texts without an answer or with a cut one.

    Args:
        texts: Texts, of which one block is read at a time.
        answer: Function from a block of texts to their labels.
        choice: The labels that are asked for.
        show_progress_bar: Whether to show a progress bar on standard error after two seconds; ``None``: if that is a
            terminal.

    Raises:
        ValueError: if a text is not a string, once it is read.
    """
    remaining, number, unknown, full = iter(texts), 0, 0, 0
    total = len(texts) if isinstance(texts, Sized) else None
    disable = None if show_progress_bar is None else not show_progress_bar
    # A hidden bar would take 3 % of the time of one text.
    progress: AbstractContextManager[tqdm[Any] | None] = (
        nullcontext() if disable else tqdm(total=total, unit=" texts", disable=disable, delay=PROGRESS_DELAY)
    )
    try:
        with progress as bar:
            while block := list(islice(remaining, BATCH_SIZE if choice.reranking is None else TEXTS_AT_ONCE)):
                for row, text in enumerate(block, start=number):
                    if not isinstance(text, str):
                        raise ValueError(f"text {row} must be a string, got {type(text).__name__}.")
                answers = answer(block, choice)
                number, unknown = number + len(block), unknown + answers.num_unknown
                if choice.may_be_cut:
                    full += sum(len(labels) == choice.limit for labels in answers.labels)
                yield from answers.labels
                if bar is not None:
                    bar.update(len(block))
    finally:
        warn_about_unknown(unknown, number)
        if full:
            logger.warning(
                "%d of %d texts have %d labels above the threshold and may have more: give %s for all.",
                full,
                number,
                choice.limit,
                "top_k" if choice.reranking is None else "a larger rerank_top_k and top_k",
            )
