"""A calibration, and the parts of a model whose scores it was fitted to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from hf_xmc.data.labels import LabelTexts
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.model.reranking import Reranking
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.memory_settings import MemorySettings

logger = logging.getLogger(__name__)


class ScoreSource(NamedTuple):
    """The parts of a model that its scores come from."""

    votes: tuple[int, MemorySettings] | None  # size and settings of the memory
    label_texts: LabelTexts
    long_text: str

    @classmethod
    def of(cls, memory: TrainingMemory | None, label_texts: LabelTexts, long_text: str) -> ScoreSource:
        """Return the parts as they are now, to compare them later."""
        return cls(None if memory is None else (len(memory), memory.settings), label_texts, long_text)


class FittedCalibration(NamedTuple):
    """A calibration with the source of the scores that it was fitted to."""

    calibration: Calibration
    source: ScoreSource
    reranking: Reranking | None = None

    def is_valid(self, now: ScoreSource) -> bool:
        """Return whether the memory is the one of the calibration."""
        return now.votes == self.source.votes

    def moved_to(
        self, now: ScoreSource, texts_may_be_long: bool, are_apart: Callable[[LabelTexts], bool]
    ) -> FittedCalibration:
        """Return the same calibration for other labels or another ``long_text``, and warn about each change once.

        Args:
            now: The parts of the model, with the memory of the calibration.
            texts_may_be_long: Whether the encoder has a maximum length.
            are_apart: Function that returns whether the present labels are earlier ones and labels with probabilities
                of their own. Those change no score of another label.
        """
        changed = now.label_texts is not self.source.label_texts
        if changed and now.votes is not None and not are_apart(self.source.label_texts):
            logger.warning(
                "The labels are not those of the calibration. With a memory a score is a share among all labels: "
                "call `calibrate` again if many have changed."
            )
        if now.long_text != self.source.long_text and texts_may_be_long:
            logger.warning(
                "long_text is %r and was %r when the calibration was made or loaded: call `calibrate` again if there "
                "are long texts.",
                now.long_text,
                self.source.long_text,
            )
        return self._replace(source=now)

    @property
    def before_reranking(self) -> Calibration | None:
        """The calibration if it is for scores of the model itself, ``None`` if it is for those of a reranker."""
        return self.calibration if self.reranking is None else None


def check_calibrated(fitted: FittedCalibration | None, reranking: Reranking | None, required: bool) -> None:
    """Check that the calibration of a model is the one for scores with a reranker, or without one.

    Args:
        fitted: The calibration, if the model has one.
        reranking: The reranker of the scores.
        required: Whether there must be a calibration.

    Raises:
        ValueError: if the calibration is required and missing, or was fitted with another reranker or without one.
    """
    if fitted is None and required:
        raise ValueError(
            "a threshold is a probability, and the scores are not calibrated yet: call `calibrate` with validation "
            "queries."
        )
    if fitted is not None and reranking != fitted.reranking:
        raise ValueError(
            f"the model is calibrated for scores with {fitted.reranking or 'rerank=None'}, got "
            f"{reranking or 'rerank=None'}. Give the same, call `calibrate` with it, or set `model.calibration = "
            "None` for scores that are no probabilities."
        )
