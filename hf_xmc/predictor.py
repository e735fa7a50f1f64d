"""Labels for texts: what queries with known labels teach a model without training, and what it then predicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from typing import Any, overload

import numpy as np
import scipy.sparse as sp
from datasets import Dataset
from tqdm.auto import tqdm

from hf_xmc.calibration import Calibration, choose_threshold
from hf_xmc.columns import as_dataset, refuse_one, texts_of
from hf_xmc.data import relevance_of
from hf_xmc.explanation import Explanation, explain
from hf_xmc.hierarchy import Hierarchy
from hf_xmc.index import TopK, unit
from hf_xmc.memory import TrainingMemory
from hf_xmc.predictions import Prediction, predictions_of
from hf_xmc.searcher import BATCH, Searcher

logger = logging.getLogger(__name__)


class Predictor(Searcher):
    """What :class:`hf_xmc.XMCModel` predicts with; its arguments and attributes are described there."""

    calibration: Calibration | None = None

    @property
    def memory(self) -> TrainingMemory | None:
        """Queries that vote, see :meth:`remember`. Another memory, or ``None``, ends the calibration."""
        return self._memory

    @memory.setter
    def memory(self, memory: TrainingMemory | None) -> None:
        self._forget_calibration()
        self._memory = memory

    def remember(self, queries: Dataset) -> None:
        """Let queries with known labels vote from now on, see :class:`hf_xmc.TrainingMemory`; nothing is trained.

        Args:
            queries: columns ``text`` and ``label_ids``, rows of :attr:`labels`: those of the training, or newer ones.
        """
        texts, relevance = self._known(queries)
        embeddings = unit(self.embed(texts)).half()  # norms may be beyond float16
        if self.memory is None:
            self.memory = TrainingMemory(embeddings, relevance, texts)
        else:
            self.memory.add(embeddings, relevance, texts)

    def tune_memory(self, validation: Dataset, **settings: Any) -> dict[str, Any]:
        """Choose how the votes count on queries that the memory does not hold; as :meth:`hf_xmc.TrainingMemory.tune`.

        Args:
            validation: columns ``text`` and ``label_ids``, rows of :attr:`labels`.
            settings: ``metric``, ``inverse_propensity``, ``tolerance``, ``exclude``.

        Raises:
            ValueError: there is no memory, no positive to tune on, or another metric.
        """
        if self.memory is None:
            raise ValueError("there is no memory to tune: call `remember` with the training queries first.")
        texts, relevance = self._known(validation)
        tuned = self.memory.tune(self.embed(texts), relevance, self.label_index, **settings)
        self._forget_calibration()
        return tuned

    def calibrate(self, validation: Dataset, top_k: int = 5, *, exclude: np.ndarray | None = None) -> None:
        """Make scores mean probability from now on, see :class:`hf_xmc.calibration.Calibration`.

        Args:
            validation: columns ``text`` and ``label_ids``, rows of :attr:`labels`; queries that neither the training
                nor the memory has seen.
            top_k: how many labels of a text will be read.
            exclude: filter pairs.
        """
        texts, relevance = self._known(validation)
        self.calibration = Calibration.fit(self.search(texts, top_k, exclude=exclude), relevance)

    def threshold_for(
        self,
        validation: Dataset,
        top_k: int = 5,
        *,
        precision: float | None = None,
        labels_per_text: float | None = None,
        exclude: np.ndarray | None = None,
    ) -> float:
        """A threshold for :meth:`predict`: of the best micro F1, unless something else is wanted.

        Args:
            validation, top_k, exclude: as in :meth:`calibrate`.
            precision: the share of predictions that are to be right.
            labels_per_text: how many labels a text is to get on average.

        Raises:
            ValueError: the model is not calibrated, or no threshold does it.
        """
        texts, relevance = self._known(validation)
        found = self.search(texts, top_k, exclude=exclude)
        found = TopK(found.label_ids, self._calibrated()(found.scores))
        return choose_threshold(found, relevance, precision=precision, labels_per_text=labels_per_text)

    def _known(self, queries: Dataset) -> tuple[list[str], sp.csr_array]:
        """Return the texts of queries and their positives ``(N, L)``.

        Raises:
            ValueError: if a column is missing or has a wrong form; the message names row and column.
        """
        queries = as_dataset(queries, "queries")
        return texts_of(queries).to_pylist(), relevance_of(queries, len(self.labels))

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise ValueError(
                "a threshold is a probability, and the scores are none yet: call `calibrate` with validation queries."
            )
        return self.calibration

    def _forget_calibration(self) -> None:
        if self.calibration is not None:
            logger.warning("The memory changes what scores mean: call `calibrate` again.")
            self.calibration = None

    def explain(self, text: str, label_id: str, nearest: int = 5) -> Explanation:
        """Why a label is predicted for a text, or is not; ``print`` shows it line by line.

        Args:
            text: one that is not blank; of a long one, what :meth:`embed` makes of it.
            label_id: as :meth:`predict` shows it.
            nearest: how many training queries with this label to show, of those remembered.
        """
        label = int(self.table.rows_of([label_id])[0])
        query, about = self.embed([text]), self.labels[label]
        return explain(query, label, about, self.label_index, self.memory, self.calibration, nearest)

    @overload
    def predict(self, texts: str, top_k: int = 5, **choices: Any) -> list[Prediction]: ...

    @overload
    def predict(self, texts: Sequence[str], top_k: int = 5, **choices: Any) -> list[list[Prediction]]: ...

    def predict(  # type: ignore[misc]
        self,
        texts: str | Sequence[str],
        top_k: int = 5,
        *,
        threshold: float | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        hierarchy: Hierarchy | None = None,
        show_progress_bar: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The best labels of each text, best first: all of them where there are fewer than ``top_k``.

        Args:
            texts: one text, which gives one list, or several, which give a list each. A blank text has no label.
            top_k: how many labels.
            threshold: the least probability of a label, of a model that is calibrated; a text may then have none.
            allow, deny: ids of labels to choose from, or not to.
            hierarchy: lets scores rise from labels to their ancestors, see :meth:`hf_xmc.Hierarchy.roll_up`.
            show_progress_bar: on standard error.

        Scores are probabilities once :meth:`calibrate` was called. Before, they compare the labels of one text: the
        encoder's similarities, or with a memory what :class:`hf_xmc.TrainingMemory` makes of them.
        """
        choices: dict[str, Any] = {"threshold": threshold, "allow": allow, "deny": deny, "hierarchy": hierarchy}
        choices["show_progress_bar"] = show_progress_bar
        predictions = self.predict_stream([texts] if isinstance(texts, str) else texts, top_k, **choices)
        return next(predictions) if isinstance(texts, str) else list(predictions)

    def predict_stream(
        self,
        texts: Iterable[str],
        top_k: int = 5,
        *,
        threshold: float | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        hierarchy: Hierarchy | None = None,
        show_progress_bar: bool | None = False,
    ) -> Iterator[list[Prediction]]:
        """:meth:`predict` for texts without end: 1024 are read and answered at a time, and none is kept.

        Args:
            show_progress_bar: on standard error; ``None`` where that is a terminal.
        """
        refuse_one("a list or an iterator of texts", texts)
        if threshold is not None:
            self._calibrated()
        visible = None if allow is None and deny is None else self.table.visible(allow, deny)
        rise = None
        if hierarchy is not None:
            rows = self.table.rows_of(hierarchy.label_ids).tolist()
            named = dict(zip(hierarchy.label_ids, rows, strict=True))
            rise = partial(hierarchy.roll_up, rows=named, hidden=None if visible is None else ~visible)
        total = len(texts) if isinstance(texts, Sized) else None
        off = None if show_progress_bar is None else not show_progress_bar
        remaining, number = iter(texts), 0
        with tqdm(total=total, unit=" texts", disable=off) as bar:
            while block := list(islice(remaining, BATCH)):
                for place, text in enumerate(block, start=number):
                    if not isinstance(text, str):
                        raise ValueError(f"text {place} is a {type(text).__name__}; expected a string.")
                yield from self._predict_block(block, top_k, threshold, visible, rise)
                number += len(block)
                bar.update(len(block))

    def _predict_block(
        self,
        texts: list[str],
        top_k: int,
        threshold: float | None,
        visible: np.ndarray | None,
        rise: Callable[[TopK, int], TopK] | None,
    ) -> list[list[Prediction]]:
        written = [number for number, text in enumerate(texts) if text.strip()]
        k, allow = min(top_k, len(self.labels)), None if visible is None else np.flatnonzero(visible)
        found = self.search([texts[number] for number in written], k, allow=allow)
        found = found if rise is None else rise(found, k)
        if self.calibration is not None:
            found = TopK(found.label_ids, self.calibration(found.scores))
        predictions: list[list[Prediction]] = [[] for _ in texts]
        for number, labels in zip(written, predictions_of(found, self.labels, threshold), strict=True):
            predictions[number] = labels
        return predictions
