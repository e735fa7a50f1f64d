"""nDCG@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.metrics
import hf_xmc.metrics.hf_evaluate


class XMCNdcg(hf_xmc.metrics.hf_evaluate.RankingMetric):
    name = "nDCG"
    function = staticmethod(hf_xmc.metrics.ndcg_at_k)
