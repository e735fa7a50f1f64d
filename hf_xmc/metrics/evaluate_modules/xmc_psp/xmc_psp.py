"""PSP@k of extreme multi-label classification; see hf_xmc.metrics."""

import hf_xmc.metrics
import hf_xmc.metrics.hf_evaluate


class XMCPsp(hf_xmc.metrics.hf_evaluate.RankingMetric):
    name = "PSP"
    function = staticmethod(hf_xmc.metrics.psp_at_k)
    inputs = "inverse_propensity: one number per label, from hf_xmc.metrics.frequency.inverse_propensity."
