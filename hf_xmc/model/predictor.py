"""Labels for texts: predicted at once or as a stream, and explained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple, overload

import numpy as np
from tqdm.auto import tqdm

from hf_xmc.data.columns import refuse_one
from hf_xmc.model.calibrated import FIRST, MAX_LABELS, Calibrated
from hf_xmc.model.explanation import Explanation, explain
from hf_xmc.model.hierarchy import Hierarchy
from hf_xmc.model.predictions import Prediction, predictions_of
from hf_xmc.model.searcher import BATCH
from hf_xmc.topk import TopK, checked_k

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The labels that are wanted for a text."""

    top_k: int | None
    threshold: float | None
    allow: np.ndarray | None
    rise: Callable[[TopK, int], TopK] | None

    @property
    def without_end(self) -> bool:
        return self.top_k is None and self.threshold is not None


class Predictor(Calibrated):
    """The part of :class:`hf_xmc.XMCModel` that predicts; its arguments and attributes are described there."""

    def explain(self, text: str, label_id: str, nearest: int = 5) -> Explanation:
        """Explain why a label is predicted for a text, or is not; ``print`` shows it line by line.

        Args:
            text: A text that is not blank; a long one is read as :meth:`embed` reads it.
            label_id: As :meth:`predict` shows it.
            nearest: How many remembered queries with this label to show.

        Raises:
            ValueError: if the label is unknown, or the text is blank or holds no token that the encoder knows.
        """
        label = int(self.table.rows_of([label_id])[0])
        query, about = self.embed([text]), self.labels[label]
        if not text.strip() or not query.any():
            raise ValueError(f"the text {text[:60]!r} holds no token that the encoder knows: it gets no label.")
        return explain(query, label, about, self.label_index, self.memory, self.calibration, nearest)

    @overload
    def predict(self, texts: str, top_k: int | None = None, **choices: Any) -> list[Prediction]: ...

    @overload
    def predict(self, texts: Sequence[str], top_k: int | None = None, **choices: Any) -> list[list[Prediction]]: ...

    def predict(  # type: ignore[misc]
        self,
        texts: str | Sequence[str],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        hierarchy: Hierarchy | None = None,
        show_progress_bar: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Return the best labels of each text, best first.

        Args:
            texts: One text, which gives one list, or several, which give a list each. A blank text, and one that
                embeds to zero because the encoder knows none of its tokens, has no label.
            top_k: Maximum number of labels of a text. By default 5, or with a threshold all that reach it, 200 at most.
            threshold: The least probability of a label, from 0 to 1, for a calibrated model. A text may have no label.
            allow, deny: Ids of the labels to choose from, or not to choose.
            hierarchy: Lets scores rise from labels to their ancestors, see :meth:`hf_xmc.Hierarchy.roll_up`.
            show_progress_bar: Whether to show a progress bar on standard error.

        Raises:
            ValueError: if an argument is not of this form, or there is a threshold and the model is not calibrated.

        Scores are probabilities once :meth:`calibrate` was called. Before, they compare the labels of one text: the
        encoder's similarities, or with a memory the mixed scores of :class:`hf_xmc.TrainingMemory`.
        """
        choices: dict[str, Any] = {"threshold": threshold, "allow": allow, "deny": deny, "hierarchy": hierarchy}
        choices["show_progress_bar"] = show_progress_bar
        predictions = list(self.predict_stream([texts] if isinstance(texts, str) else texts, top_k, **choices))
        return predictions[0] if isinstance(texts, str) else predictions

    def predict_stream(
        self,
        texts: Iterable[str],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        hierarchy: Hierarchy | None = None,
        show_progress_bar: bool | None = False,
    ) -> Iterator[list[Prediction]]:
        """:meth:`predict` for an endless stream of texts: reads and answers 1024 at a time, and keeps none.

        Arguments are checked at the call, each text when it is read.

        Args:
            show_progress_bar: Whether to show a progress bar on standard error; ``None``: if that is a terminal.
        """
        refuse_one("a list or an iterator of texts", texts)
        top_k = None if top_k is None else checked_k(top_k, "top_k")
        if threshold is not None:
            self._calibrated()
            if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
                raise ValueError(f"threshold is a probability and must be from 0 to 1, got {threshold!r}.")
        visible = None if allow is None and deny is None else self.table.visible(allow, deny)
        rise = None
        if hierarchy is not None:
            rows = self.table.rows_of(hierarchy.label_ids).tolist()
            named = dict(zip(hierarchy.label_ids, rows, strict=True))
            rise = partial(hierarchy.roll_up, rows=named, hidden=None if visible is None else ~visible)
        choice = Choice(top_k, threshold, None if visible is None else np.flatnonzero(visible), rise)
        off = None if show_progress_bar is None else not show_progress_bar
        return self._answers(texts, choice, off)

    def _answers(self, texts: Iterable[str], choice: Choice, off: bool | None) -> Iterator[list[Prediction]]:
        remaining, number, unknown, full = iter(texts), 0, 0, 0
        try:
            with tqdm(total=len(texts) if isinstance(texts, Sized) else None, unit=" texts", disable=off) as bar:
                while block := list(islice(remaining, BATCH)):
                    for place, text in enumerate(block, start=number):
                        if not isinstance(text, str):
                            raise ValueError(f"text {place} is a {type(text).__name__}; expected a string.")
                    answers, recognised = self._predict_block(block, choice)
                    number, unknown = number + len(block), unknown + len(block) - recognised
                    if choice.without_end and len(self.labels) > MAX_LABELS:
                        full += sum(len(labels) == MAX_LABELS for labels in answers)
                    yield from answers
                    bar.update(len(block))
        finally:
            self._tell_of_unknown(unknown, number)
            if full:
                logger.warning(
                    "%d of %d texts have %d labels above the threshold and may have more: give top_k for all.",
                    full,
                    number,
                    MAX_LABELS,
                )

    def _predict_block(self, texts: list[str], choice: Choice) -> tuple[list[list[Prediction]], int]:
        """Return the labels of each text, and the number of texts that hold something the encoder knows."""
        written = [number for number, text in enumerate(texts) if text.strip()]
        k = MAX_LABELS if choice.without_end else choice.top_k or FIRST
        k = min(k, len(self.labels))
        found, recognised = self._found([texts[number] for number in written], k, False, None, allow=choice.allow)
        if self.calibration is not None:
            found = TopK(found.label_ids, self.calibration(found.scores))
        found = found if choice.rise is None else choice.rise(found, k)
        predictions: list[list[Prediction]] = [[] for _ in texts]
        for number, labels in zip(written, predictions_of(found, self.labels, choice.threshold), strict=True):
            predictions[number] = labels
        return predictions, int(recognised.sum())
