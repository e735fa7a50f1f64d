"""nDCG@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.evaluate_metrics
import hf_xmc.metrics


class XMCNdcg(hf_xmc.evaluate_metrics.RankingMetric):
    name = "nDCG"
    function = staticmethod(hf_xmc.metrics.ndcg_at_k)
