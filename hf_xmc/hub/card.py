"""The model card: the known facts about a model, rendered by ``model_card_template.md``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

import hf_xmc
from hf_xmc.hub.self_contained import adapters_of

TEMPLATE = Path(__file__).with_name("model_card_template.md")
SOME_REPOSITORY = "org/name"  # the name in a card until the model is pushed
TASK = "extreme-multilabel-classification"
PACKAGES = ("sentence-transformers", "transformers", "torch")


def versions() -> dict[str, str]:
    """Return the versions of the packages used for training."""
    others = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"hf_xmc": hf_xmc.__version__, **others}


@dataclass
class XMCCard:
    """The facts in a model card. Unknown facts are left out.

    Attributes:
        label_vectors: Whether labels have vectors of their own in addition to their texts.
        results: Metrics of each split, as fractions. The deciles belong to the first split.
        variants: Metrics of other ways to predict, by name; they are not in the metadata.
        deciles: Rows of :func:`hf_xmc.metrics.frequency.by_frequency_decile`, as dictionaries.
        about_scores: A sentence on how far the scores are probabilities.
        predictions: Predicted labels of ``example``, with ``text`` and ``score``.
    """

    num_labels: int
    embedding_dim: int
    similarity: str
    encoder: str
    name: str = "Extreme multi-label classification"
    repo_id: str = SOME_REPOSITORY
    base_model: str | None = None
    data: str | None = None
    dataset_id: str | None = None
    num_train: int | None = None
    num_remembered: int = 0
    label_vectors: bool = False
    loss: str | None = None
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deciles: Sequence[Mapping[str, Any]] = ()
    training_time: str | None = None
    hardware: str | None = None
    energy_kwh: float | None = None
    about_scores: str | None = None
    example: str = "a text to classify"
    predictions: Sequence[Any] = ()
    language: str | list[str] | None = None
    license: str | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    def render(self) -> str:
        """Return the text of ``README.md``: metadata with the results in the Hub's format, and prose."""
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(card=self, metadata=self._metadata().to_yaml())

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as values of JSON."""
        shown = [one._asdict() if hasattr(one, "_asdict") else dict(one) for one in self.predictions]
        facts: dict[str, Any] = json.loads(json.dumps({**asdict(self), "predictions": shown}, default=_plain))
        return facts

    def _metadata(self) -> ModelCardData:
        tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "hf-xmc", TASK]
        tags += ["arxiv:2310.10636", *([f"loss:{self.loss}"] if self.loss else [])]
        results = [
            EvalResult(
                task_type=TASK,
                task_name="Extreme Multilabel Classification",
                dataset_type=self.dataset_id or "unknown",
                dataset_name=self.data or "Unknown",
                dataset_split=split or None,
                metric_type=metric,
                metric_name=metric,
                metric_value=round(value, 6),
            )
            for split, metrics in self.results.items()
            for metric, value in metrics.items()
        ]
        return ModelCardData(
            language=self.language,
            license=self.license,
            library_name="sentence-transformers",  # the Hub shows how to load the model with it
            pipeline_tag="sentence-similarity",
            base_model=self.base_model,
            datasets=[self.dataset_id] if self.dataset_id else None,
            tags=tags,
            model_name=self.name,
            eval_results=results or None,
        )


def record_loss(encoder: SentenceTransformer, loss: nn.Module) -> None:
    """Add the settings of a loss to the facts that sentence-transformers records in an encoder during training."""
    settings: dict[str, Any] = getattr(loss, "get_config_dict", dict)()
    recorded: list[dict[str, Any]] = encoder.model_card_data.train_datasets
    for dataset in recorded:
        dataset.setdefault("loss", {})["settings"] = settings


def card_of(encoder: SentenceTransformer, num_labels: int, num_remembered: int = 0) -> XMCCard:
    """Return the card of a model, with the facts that sentence-transformers recorded during training.

    Args:
        encoder: Encoder of the model.
        num_labels: Number of its labels.
        num_remembered: Number of queries in its memory.
    """
    recorded = encoder.model_card_data
    trained: dict[str, Any] = next(iter(recorded.train_datasets), {})
    loss = trained.get("loss", {})
    results: dict[str, dict[str, float]] = {}
    for evaluator, metrics in (recorded.eval_results_dict or {}).items():
        split = getattr(evaluator, "name", "")
        named = {name.removeprefix(f"{split}_"): float(value) for name, value in metrics.items()}
        results[split] = {name: value for name, value in named.items() if "@" in name}
    carbon = recorded.code_carbon_callback
    return XMCCard(
        num_labels=num_labels,
        num_remembered=num_remembered,
        embedding_dim=encoder.get_embedding_dimension() or 0,
        similarity=encoder.similarity_fn_name or "cosine",
        encoder=describe_encoder(encoder, recorded.base_model),
        base_model=recorded.base_model,
        data=trained.get("name"),
        dataset_id=trained.get("id"),
        num_train=trained.get("size"),
        loss=loss["fullname"].rsplit(".", 1)[-1] if "fullname" in loss else None,
        loss_settings=loss.get("settings", {}),
        hyperparameters=recorded.non_default_hyperparameters,
        results={split: metrics for split, metrics in results.items() if metrics},
        training_time=recorded.get_training_duration_data().get("training_time") if trained else None,
        hardware=hardware() if trained else None,
        energy_kwh=recorded.get_codecarbon_data()["co2_eq_emissions"]["energy_consumed"] if carbon else None,
        language=recorded.language or None,
        license=recorded.license,
    )


def current_card(
    card: XMCCard | str | None,
    encoder: SentenceTransformer,
    num_labels: int,
    num_remembered: int,
    repo_id: str | None = None,
    label_vectors: bool = False,
) -> XMCCard | str:
    """Return the card to save with a model.

    An edited card is returned unchanged. Other cards get the current size of the model, and the repository
    if the model is pushed to one. Results stay as they were measured.
    """
    if isinstance(card, str):
        return card
    card = card or card_of(encoder, num_labels, num_remembered)
    now: dict[str, Any] = {"num_labels": num_labels, "num_remembered": num_remembered, "label_vectors": label_vectors}
    return replace(card, **now, repo_id=repo_id or card.repo_id)


def card_entry(card: XMCCard | str, text: str) -> dict[str, Any]:
    """Return the entry of a manifest for a card: its facts, and the SHA-256 of the text rendered from them."""
    return {} if isinstance(card, str) else {"facts": card.to_dict(), "sha256": _sha256(text)}


def read_card(text: str, entry: object) -> XMCCard | str:
    """Return the facts of a card, or its text if someone edited it or the facts cannot be rendered.

    Args:
        text: The text of ``README.md``.
        entry: The entry of the manifest, see :func:`card_entry`.
    """
    if not isinstance(entry, dict) or entry.get("sha256") != _sha256(text):
        return text
    try:
        card = XMCCard(**entry["facts"])
        card.render()
    except Exception:  # the facts may come from anyone, and hold values of any type
        return text
    return card


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def describe_encoder(encoder: SentenceTransformer, base_model: str | None = None) -> str:
    """Describe an encoder in a few words."""
    if isinstance(encoder[0], StaticEmbedding):
        rows = encoder[0].embedding.num_embeddings
        return f"a static encoder with {rows:,} token vectors"
    model: Any = getattr(encoder[0], "auto_model", encoder[0])
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    kind = f"{kind}, from {base_model}" if base_model else kind
    merged = adapters_of(encoder)
    return f"{kind}, with {' and '.join(merged)} adapters merged into its weights" if merged else kind


def hardware() -> str:
    """Return a description of the available processors."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
