"""Ranking metrics, label frequency, calibration, and modules for `evaluate`."""

from hf_xmc.metrics.ranking import (
    evaluate_ranking,
    match_predictions,
    ndcg_at_k,
    precision_at_k,
    psndcg_at_k,
    psp_at_k,
    psr_at_k,
    recall_at_k,
)

__all__ = [
    "evaluate_ranking",
    "match_predictions",
    "ndcg_at_k",
    "precision_at_k",
    "psndcg_at_k",
    "psp_at_k",
    "psr_at_k",
    "recall_at_k",
]
