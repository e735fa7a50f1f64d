"""P@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.metrics
import hf_xmc.metrics.hf_evaluate


class XMCPrecision(hf_xmc.metrics.hf_evaluate.RankingMetric):
    name = "P"
    function = staticmethod(hf_xmc.metrics.precision_at_k)
