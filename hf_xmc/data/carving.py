"""Take missing splits of a data set from its training queries."""

from __future__ import annotations

import logging
from dataclasses import replace

from hf_xmc.data.dataset import XMCData

logger = logging.getLogger(__name__)

VALIDATION, TEST = 0.02, 0.1  # fractions of the training queries
MIN_VALIDATION = 50  # queries, but at most a tenth of the training queries
MIN_TRAIN = 20  # minimum number of queries from which to take a split


def carve(
    data: XMCData, *, validation: int | float | None = VALIDATION, test: int | float | None = TEST, seed: int = 0
) -> XMCData:
    """Return the data with any missing validation or test split taken from train.

    The selection is reproducible: it depends on the texts and the seed alone (see
    :meth:`hf_xmc.XMCData.move_from_train`). ``load_report`` and one log line give the number of queries. A prepared
    data set keeps the splits and the report.

    Args:
        data: Data set with at least 20 training queries; one with fewer is returned unchanged, and a log line says so.
        validation: Number of queries, or a fraction of the training queries as a ``float``. A fraction takes at least
            50 queries, unless that exceeds a tenth of the training queries. ``None`` takes no split.
        test: Number of queries, or a fraction of the training queries as a ``float``. ``None`` takes no split.
        seed: Seed of the selection.

    Raises:
        ValueError: if a size is not between 0 and the number of training queries.

    >>> from hf_xmc import XMCData
    >>> data = XMCData.from_lists([f"text {number}" for number in range(100)], [["label"]] * 100)
    >>> {name: len(split) for name in ("train", "validation", "test") if (split := carve(data).split(name))}
    {'train': 81, 'validation': 9, 'test': 10}
    """
    total = len(data.train)
    wanted = {"test": test, "validation": validation}
    missing = {name: size for name, size in wanted.items() if size is not None and getattr(data, name) is None}
    if missing and total < MIN_TRAIN:
        logger.info("Took no %s split from only %d training queries.", " or ".join(missing), total)
        return data
    report = dict(data.load_report)
    for name, given in missing.items():
        size = given
        if isinstance(given, float):
            size = round(given * total)
            if name == "validation":
                size = max(size, min(MIN_VALIDATION, len(data.train) // 10))
        data = data.move_from_train(name, size, seed)
        report[f"{name}: queries taken from train, seed {seed}"] = len(data.split(name))
        logger.info("%s: took %d of %d training queries, seed %d.", name, len(data.split(name)), total, seed)
    return replace(data, load_report=report)
