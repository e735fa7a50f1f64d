"""PSnDCG@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.metrics
import hf_xmc.metrics.hf_evaluate


class XMCPsndcg(hf_xmc.metrics.hf_evaluate.RankingMetric):
    name = "PSnDCG"
    function = staticmethod(hf_xmc.metrics.psndcg_at_k)
    inputs = "inverse_propensity: one number per label, from hf_xmc.metrics.frequency.inverse_propensity."
