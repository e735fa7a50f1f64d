"""Learn from queries with known labels without training the encoder: votes, probabilities and thresholds."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import scipy.sparse as sp
from datasets import Dataset

from hf_xmc.data.columns import as_dataset, texts_of
from hf_xmc.data.dataset import relevance_of
from hf_xmc.data.labels import LabelTexts
from hf_xmc.encoders.long_text import max_tokens
from hf_xmc.metrics.calibration import Calibration, check_wanted, choose_threshold
from hf_xmc.model.searcher import Searcher
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.memory_settings import MemorySettings
from hf_xmc.tensors import unit
from hf_xmc.topk import TopK, checked_k

logger = logging.getLogger(__name__)

FIRST = 5  # labels of a text that are predicted by default
MAX_LABELS = 200  # labels of a text that a threshold chooses from


class Calibrated(Searcher):
    """The part of :class:`hf_xmc.XMCModel` that learns from queries with known labels, without training the encoder."""

    _calibration: Calibration | None = None
    _scored_by: tuple[tuple[int, MemorySettings] | None, LabelTexts, str]  # when the calibration was made

    @property
    def memory(self) -> TrainingMemory | None:
        """Queries that vote, see :meth:`remember`. Another memory, or ``None``, ends the calibration."""
        return self._memory

    @memory.setter
    def memory(self, memory: TrainingMemory | None) -> None:
        self._forget_calibration()
        self._memory = memory

    @property
    def calibration(self) -> Calibration | None:
        """The map from scores to probabilities, see :meth:`calibrate`. It ends when the memory changes."""
        if self._calibration is None:
            return None
        votes, table, long_text = self._scored_by
        if votes != self._votes():
            self._forget_calibration()
        elif table is not self.table or long_text != self.long_text:
            self._scored_by = votes, self.table, self.long_text  # each change is said once
            if table is not self.table and self.memory is not None:
                logger.warning(
                    "The labels are not those of the calibration. With a memory a score is a share among all labels: "
                    "call `calibrate` again if many have changed."
                )
            if long_text != self.long_text and max_tokens(self.encoder) is not None:
                logger.warning(
                    "long_text is %r and was %r when the calibration was made or loaded: call `calibrate` again if "
                    "there are long texts.",
                    self.long_text,
                    long_text,
                )
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self._calibration = calibration
        self._scored_by = self._votes(), self.table, self.long_text

    def _votes(self) -> tuple[int, MemorySettings] | None:
        """Return what tells a memory from the same memory after a change."""
        return None if self.memory is None else (len(self.memory), self.memory.settings)

    def remember(self, queries: Dataset) -> None:
        """Let queries with known labels vote from now on, see :class:`hf_xmc.TrainingMemory`; nothing is trained.

        A calibration ends: call :meth:`calibrate` afterwards.

        Args:
            queries: Columns ``text`` and ``label_ids``, rows of :attr:`labels`: the training queries, or newer ones.
        """
        texts, relevance = self._known(queries)
        embeddings = unit(self.embed(texts)).half()  # norms may be beyond float16
        if self.memory is None:
            self.memory = TrainingMemory(embeddings, relevance, texts)
        else:
            self.memory.add(embeddings, relevance, texts)
        self._forget_calibration()

    def tune_memory(self, validation: Dataset, **settings: Any) -> dict[str, Any]:
        """Choose how the votes count, by queries with known labels; see :meth:`hf_xmc.TrainingMemory.tune`.

        A query that the memory holds gets no vote of its own; how many there are is said. A calibration ends.

        Args:
            validation: Columns ``text`` and ``label_ids``, rows of :attr:`labels`.
            settings: ``metric``, ``inverse_propensity``, ``tolerance``, ``exclude``.

        Raises:
            ValueError: if there is no memory, there is no positive to tune on, or the metric is unknown.
        """
        if self.memory is None:
            raise ValueError("there is no memory to tune: call `remember` with the training queries first.")
        texts, relevance = self._known(validation)
        queries = self.embed(texts)
        own = self._own_rows(texts, queries)
        tuned = self.memory.tune(queries, relevance, self.label_index, silent=own, **settings)
        self._forget_calibration()
        return tuned

    def calibrate(self, validation: Dataset, top_k: int = FIRST, *, exclude: np.ndarray | None = None) -> None:
        """Make scores mean probability from now on, see :class:`hf_xmc.metrics.calibration.Calibration`.

        The first ``top_k`` labels of a text have one map, those after them, up to the 200 that a threshold chooses
        from, another. A text that the memory holds gets no vote of its own; how many there are is said.

        Args:
            validation: Columns ``text`` and ``label_ids``, rows of :attr:`labels`: queries that the encoder was not
                trained on.
            top_k: How many labels of a text will be read without a threshold.
            exclude: Filter pairs.

        Raises:
            ValueError: if there is no prediction to learn from.
        """
        top_k = checked_k(top_k, "top_k")
        texts, relevance = self._known(validation)
        found = self._held_out(texts, max(top_k, MAX_LABELS), exclude)
        self.calibration = Calibration.fit(found, relevance, top_k)

    def threshold_for(
        self,
        validation: Dataset,
        top_k: int | None = None,
        *,
        precision: float | None = None,
        labels_per_text: float | None = None,
        exclude: np.ndarray | None = None,
    ) -> float:
        """Choose a threshold for :meth:`predict`: the one of the best micro F1, unless something else is wanted.

        Args:
            validation: As in :meth:`calibrate`; a text that the memory holds gets no vote of its own here either.
            top_k: As ``predict`` will be called: by default all labels above the threshold, 200 at most.
            precision: The wanted share of right predictions.
            labels_per_text: The wanted mean number of labels of a text.
            exclude: Filter pairs.

        Raises:
            ValueError: if the model is not calibrated, or no threshold gives what is wanted.
        """
        top_k = MAX_LABELS if top_k is None else checked_k(top_k, "top_k")
        check_wanted(precision, labels_per_text)
        texts, relevance = self._known(validation)
        calibration = self._calibrated()
        found = self._held_out(texts, top_k, exclude)
        found = TopK(found.label_ids, calibration(found.scores))
        return choose_threshold(found, relevance, precision=precision, labels_per_text=labels_per_text)

    def _held_out(self, texts: list[str], top_k: int, exclude: np.ndarray | None) -> TopK:
        """Return the best labels of texts, which get no vote of their own."""
        return self.search(texts, min(top_k, max(1, len(self.labels))), exclude=exclude, leave_one_out=True)

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
                "a threshold is a probability, and the scores are not calibrated yet: call `calibrate` with validation "
                "queries."
            )
        return self.calibration

    def _forget_calibration(self, reason: str = "The memory") -> None:
        if self._calibration is not None:
            logger.warning("%s changes what scores mean: call `calibrate` again.", reason)
            self._calibration = None
