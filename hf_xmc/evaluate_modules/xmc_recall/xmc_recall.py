"""R@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.evaluate_metrics
import hf_xmc.metrics


class XMCRecall(hf_xmc.evaluate_metrics.RankingMetric):
    name = "R"
    function = staticmethod(hf_xmc.metrics.recall_at_k)
