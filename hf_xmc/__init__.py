"""Dual encoders for extreme multi-label classification. Public names load on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "functional": ["decoupled_softmax_loss", "soft_top_k_loss", "softmax_loss", "bce_loss"],
    "losses": ["DecoupledSoftmaxLoss", "SoftTopKLoss", "SoftmaxLoss", "BCELoss"],
    "static": ["static_encoder"],
    "data": ["XMCData"],
    "loading": ["load_xmc"],
    "phrases": ["phrase_encoder", "standalone", "with_phrases", "write_phrases"],
    "in_batch": ["in_batch_dataset", "in_batch_prompts", "relevance_matrix", "InBatchCollator"],
    "training_args": ["XMCTrainingArguments"],
    "trainer": ["XMCTrainer"],
    "index": ["LabelIndex"],
    "topk": ["TopK"],
    "faiss_index": ["FaissIndex"],
    "milvus_index": ["MilvusIndex"],
    "memory": ["TrainingMemory", "MemorySettings"],
    "hierarchy": ["Hierarchy"],
    "mining": ["HardNegativeMiner", "mine_hard_negatives"],
    "evaluation": ["ExtremeMultilabelClassificationEvaluator"],
    "evaluate_metrics": ["metric_path"],
    "predictions": ["Prediction"],
    "model": ["XMCModel"],
    "card": ["XMCCard"],
    "pipelines": ["pipeline"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_xmc' has no attribute {name!r}")
    return getattr(import_module(f"hf_xmc.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
