"""Dual encoders for extreme multi-label classification. Public names load on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "losses.functional": ["decoupled_softmax_loss", "soft_top_k_loss", "softmax_loss", "bce_loss"],
    "losses.modules": ["DecoupledSoftmaxLoss", "SoftTopKLoss", "SoftmaxLoss", "BCELoss"],
    "encoders.static": ["static_encoder"],
    "data.dataset": ["XMCData"],
    "data.loading": ["load_xmc"],
    "encoders.phrases": ["phrase_encoder", "standalone", "with_phrases", "write_phrases"],
    "training.in_batch": ["in_batch_dataset", "in_batch_prompts", "relevance_matrix", "InBatchCollator"],
    "training.arguments": ["XMCTrainingArguments"],
    "training.trainer": ["XMCTrainer"],
    "search.exact": ["LabelIndex"],
    "topk": ["TopK"],
    "search.faiss_index": ["FaissIndex"],
    "search.milvus_index": ["MilvusIndex"],
    "search.memory": ["TrainingMemory", "MemorySettings"],
    "model.hierarchy": ["Hierarchy"],
    "training.mining": ["HardNegativeMiner", "mine_hard_negatives"],
    "evaluator": ["ExtremeMultilabelClassificationEvaluator"],
    "metrics.hf_evaluate": ["metric_path"],
    "model.predictions": ["Prediction"],
    "model.model": ["XMCModel"],
    "hub.card": ["XMCCard"],
    "model.pipelines": ["pipeline"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_xmc' has no attribute {name!r}")
    return getattr(import_module(f"hf_xmc.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
