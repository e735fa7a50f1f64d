"""R@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.metrics
import hf_xmc.metrics.hf_evaluate


class XMCRecall(hf_xmc.metrics.hf_evaluate.RankingMetric):
    name = "R"
    function = staticmethod(hf_xmc.metrics.recall_at_k)
