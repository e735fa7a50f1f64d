"""Ranking metrics, label frequency, calibration, and the modules of `evaluate`."""

from hf_xmc.metrics.ranking import (
    evaluate_ranking,
    judge,
    ndcg_at_k,
    precision_at_k,
    psndcg_at_k,
    psp_at_k,
    psr_at_k,
    recall_at_k,
)

__all__ = [
    "evaluate_ranking",
    "judge",
    "ndcg_at_k",
    "precision_at_k",
    "psndcg_at_k",
    "psp_at_k",
    "psr_at_k",
    "recall_at_k",
]
