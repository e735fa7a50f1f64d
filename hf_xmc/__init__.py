"""Dual encoders for extreme multi-label classification. Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports a name when it is first used
    from hf_xmc.data.carving import carve
    from hf_xmc.data.dataset import XMCData
    from hf_xmc.data.loading import load_xmc
    from hf_xmc.data.vocabulary import Vocabulary
    from hf_xmc.encoders.phrases import phrase_encoder, rewrite_phrases, standalone_encoder, with_phrases
    from hf_xmc.encoders.static import static_encoder
    from hf_xmc.evaluator import ExtremeMultilabelClassificationEvaluator, XMCEvaluator
    from hf_xmc.experiment.run import train
    from hf_xmc.hub.card import XMCCard
    from hf_xmc.losses.functional import bce_loss, decoupled_softmax_loss, soft_top_k_loss, softmax_loss
    from hf_xmc.losses.modules import BCELoss, DecoupledSoftmaxLoss, SoftmaxLoss, SoftTopKLoss
    from hf_xmc.metrics.hf_evaluate import metric_path
    from hf_xmc.model.hierarchy import Hierarchy
    from hf_xmc.model.model import XMCModel
    from hf_xmc.model.predictions import Prediction
    from hf_xmc.model.reranking import Candidate
    from hf_xmc.search.exact import LabelIndex
    from hf_xmc.search.faiss_index import FaissIndex
    from hf_xmc.search.memory import TrainingMemory
    from hf_xmc.search.memory_settings import MemorySettings
    from hf_xmc.search.milvus_index import MilvusIndex
    from hf_xmc.topk import TopK
    from hf_xmc.training.arguments import XMCTrainingArguments
    from hf_xmc.training.in_batch import InBatchCollator, in_batch_dataset, in_batch_prompts, relevance_matrix
    from hf_xmc.training.mining import HardNegativeMiner, mine_hard_negatives
    from hf_xmc.training.trainer import XMCTrainer

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "Candidate",
    "DecoupledSoftmaxLoss",
    "ExtremeMultilabelClassificationEvaluator",
    "FaissIndex",
    "HardNegativeMiner",
    "Hierarchy",
    "InBatchCollator",
    "LabelIndex",
    "MemorySettings",
    "MilvusIndex",
    "Prediction",
    "SoftTopKLoss",
    "SoftmaxLoss",
    "TopK",
    "TrainingMemory",
    "Vocabulary",
    "XMCCard",
    "XMCData",
    "XMCEvaluator",
    "XMCModel",
    "XMCTrainer",
    "XMCTrainingArguments",
    "bce_loss",
    "carve",
    "decoupled_softmax_loss",
    "in_batch_dataset",
    "in_batch_prompts",
    "load_xmc",
    "metric_path",
    "mine_hard_negatives",
    "phrase_encoder",
    "relevance_matrix",
    "rewrite_phrases",
    "soft_top_k_loss",
    "softmax_loss",
    "standalone_encoder",
    "static_encoder",
    "train",
    "with_phrases",
]

_NAMES_OF = {
    "data.carving": ["carve"],
    "data.dataset": ["XMCData"],
    "data.loading": ["load_xmc"],
    "data.vocabulary": ["Vocabulary"],
    "encoders.phrases": ["phrase_encoder", "standalone_encoder", "with_phrases", "rewrite_phrases"],
    "encoders.static": ["static_encoder"],
    "evaluator": ["ExtremeMultilabelClassificationEvaluator", "XMCEvaluator"],
    "experiment.run": ["train"],
    "hub.card": ["XMCCard"],
    "losses.functional": ["bce_loss", "decoupled_softmax_loss", "soft_top_k_loss", "softmax_loss"],
    "losses.modules": ["BCELoss", "DecoupledSoftmaxLoss", "SoftTopKLoss", "SoftmaxLoss"],
    "metrics.hf_evaluate": ["metric_path"],
    "model.hierarchy": ["Hierarchy"],
    "model.model": ["XMCModel"],
    "model.predictions": ["Prediction"],
    "model.reranking": ["Candidate"],
    "search.exact": ["LabelIndex"],
    "search.faiss_index": ["FaissIndex"],
    "search.memory": ["TrainingMemory"],
    "search.memory_settings": ["MemorySettings"],
    "search.milvus_index": ["MilvusIndex"],
    "topk": ["TopK"],
    "training.arguments": ["XMCTrainingArguments"],
    "training.in_batch": ["InBatchCollator", "in_batch_dataset", "in_batch_prompts", "relevance_matrix"],
    "training.mining": ["HardNegativeMiner", "mine_hard_negatives"],
    "training.trainer": ["XMCTrainer"],
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

if not TYPE_CHECKING:  # with it, a type checker would accept every name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'hf_xmc' has no attribute {name!r}")
        return getattr(import_module(f"hf_xmc.{_MODULE_OF[name]}"), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__])
