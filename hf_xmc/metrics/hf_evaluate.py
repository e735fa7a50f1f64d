"""The metrics as modules for the ``evaluate`` library: wrappers around :mod:`hf_xmc.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import scipy.sparse as sp

MODULES = Path(__file__).parent / "evaluate_modules"


def metric_path(name: str) -> str:
    """Return the path of a metric for ``evaluate.load``.

    The metrics are ``xmc_precision``, ``xmc_ndcg`` and ``xmc_recall``, and with inverse propensities ``xmc_psp``,
    ``xmc_psndcg`` and ``xmc_psr``.

    >>> import evaluate
    >>> evaluate.load(metric_path("xmc_precision")).compute(
    ...     predictions=[[4, 7]], references=[[7, 9]], k=2
    ... )  # doctest: +SKIP
    {'P@2': 0.5}
    """
    known = sorted(path.name for path in MODULES.iterdir() if not path.name.startswith("_"))
    if name not in known:
        raise ValueError(f"`name` must be one of {', '.join(known)}, got {name!r}.")
    return str(MODULES / name)


class RankingMetric(evaluate.Metric):
    """Predictions are label ids, best first; references are the ids of the positives."""

    name: ClassVar[str]
    function: ClassVar[Callable[..., float]]

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=self.function.__doc__,
            citation="",
            inputs_description=f"{RankingMetric.__doc__} k: number of predictions that count. {self.inputs}",
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    inputs: ClassVar[str] = ""

    def _compute(
        self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]], k: int = 5, **arguments: Any
    ) -> dict[str, float]:
        width = max([k, *map(len, predictions)])
        label_ids = np.array([[*row, *[-1] * (width - len(row))] for row in predictions], dtype=np.int64)
        offsets = np.cumsum([0, *map(len, references)])
        positives = np.array([label for row in references for label in row], dtype=np.int64)
        num_labels = 1 + max(label_ids.max(initial=0), positives.max(initial=0))
        if "inverse_propensity" in arguments:
            num_labels = len(arguments["inverse_propensity"])
        relevance = sp.csr_array((np.ones(len(positives)), positives, offsets), shape=(len(references), num_labels))
        return {f"{self.name}@{k}": type(self).function(label_ids, relevance, k=k, **arguments)}
