"""Choose the splits of an experiment to hold out, to measure and to show."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from hf_xmc.data.columns import texts_of
from hf_xmc.data.dataset import XMCData

logger = logging.getLogger(__name__)


def hold_out(data: XMCData, size: float) -> XMCData:
    """Return the data with a validation split of at least one query, taken from train.

    ``data`` itself is returned if it has a validation split or cannot spare one.
    """
    if data.validation is not None or not size:
        return data
    try:
        carved = data.carve_validation(max(1, round(size * len(data.train))))
    except ValueError as error:
        logger.warning("No validation split is taken from train: %s", error)
        return data
    if not (has_labels(carved, "train") and has_labels(carved, "validation")):
        logger.warning("No validation split is taken from train, because too few of its queries have labels.")
        return data
    return carved


def has_labels(data: XMCData, split: str) -> bool:
    """Return whether the data have this split with at least one labelled query."""
    return getattr(data, split) is not None and data.relevance(split).nnz > 0


def has_propensity(data: XMCData) -> bool:
    """Return whether there are enough training queries for the propensities of PSP@k."""
    return len(data.train) >= 3


def also_in_train(data: XMCData) -> dict[str, int]:
    """Return the number of texts of each other split that are training texts too, and warn if there are any.

    :meth:`hf_xmc.XMCData.move_from_train` keeps equal texts together, so this happens only to splits that were given.
    """
    known = texts_of(data.train)
    found = {}
    for split in ("validation", "test"):
        if (queries := getattr(data, split)) is not None and (
            number := pc.sum(pc.is_in(texts_of(queries), value_set=known)).as_py()
        ):
            found[split] = number
            logger.warning(
                "%d of %d %s texts are training texts too, so the metrics of %s may be too high. Remove these texts "
                "from one of the splits, or give a single table, whose splits share no text.",
                number,
                len(queries),
                split,
                split,
            )
    return found


def split_to_measure(data: XMCData) -> str | None:
    """Return the test split, or validation if that has no labels; ``None``, and a warning, if neither has any."""
    split = next((name for name in ("test", "validation") if has_labels(data, name)), None)
    if split is None:
        logger.warning("There are no test or validation queries with labels, so nothing is measured.")
    return split


def queries_to_show(data: XMCData, metrics: Mapping[str, Any]) -> tuple[XMCData, str]:
    """Return the data of a finished run, split as in its training, and the name of the split to show.

    Args:
        data: The data as they were loaded.
        metrics: The content of ``metrics.json``. If nothing was measured, training queries are shown.
    """
    return hold_out(data, metrics["recipe"]["validation_size"]), metrics["split"] or "train"
