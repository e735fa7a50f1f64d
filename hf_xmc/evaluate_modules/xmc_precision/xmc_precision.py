"""P@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.evaluate_metrics
import hf_xmc.metrics


class XMCPrecision(hf_xmc.evaluate_metrics.RankingMetric):
    name = "P"
    function = staticmethod(hf_xmc.metrics.precision_at_k)
