"""The model card: what is known of a model, rendered by ``model_card_template.md``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import hf_xmc
from hf_xmc.hub.self_contained import adapters_of

TEMPLATE = Path(__file__).with_name("model_card_template.md")
SOME_REPOSITORY = "org/name"  # in a card, until it is pushed
TASK = "extreme-multilabel-classification"
PACKAGES = ("sentence-transformers", "transformers", "torch")


def versions() -> dict[str, str]:
    """Return the versions of the packages that the model was made with."""
    others = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"hf_xmc": hf_xmc.__version__, **others}


@dataclass
class XMCCard:
    """The facts in a model card. Unknown facts are left out.

    Attributes:
        results: by split, the metrics as fractions; the first split is the one of the deciles.
        variants: metrics of other ways to predict, by what they are; not in the metadata.
        deciles: rows of :func:`hf_xmc.metrics.frequency.by_frequency_decile`, as dictionaries.
        predictions: of ``example``, with ``text`` and ``score``.
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
    loss: str | None = None
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deciles: Sequence[Mapping[str, Any]] = ()
    training_time: str | None = None
    hardware: str | None = None
    energy_kwh: float | None = None
    example: str = "a text to classify"
    predictions: Sequence[Any] = ()
    language: str | list[str] | None = None
    license: str | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    def render(self) -> str:
        """The text of ``README.md``: metadata with the results in the Hub's evaluation-result format, and prose."""
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(card=self, metadata=self._metadata().to_yaml())

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
            library_name="sentence-transformers",  # which loads it, and by which the Hub shows how
            pipeline_tag="sentence-similarity",
            base_model=self.base_model,
            datasets=[self.dataset_id] if self.dataset_id else None,
            tags=tags,
            model_name=self.name,
            eval_results=results or None,
        )


def of_model(encoder: SentenceTransformer, num_labels: int, num_remembered: int = 0) -> str:
    """The card of a model, with what sentence-transformers recorded while it was trained.

    Args:
        encoder: of the model.
        num_labels, num_remembered: its labels, and the queries in its memory.
    """
    recorded = encoder.model_card_data
    trained: dict[str, Any] = next(iter(recorded.train_datasets), {})
    loss = trained.get("loss", {})
    settings = re.search(r"\{.*\}", loss.get("config_code", ""), re.DOTALL)
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
        loss=loss["fullname"].rsplit(".", 1)[-1] if loss else None,
        loss_settings=json.loads(settings[0]) if settings else {},
        hyperparameters=recorded.non_default_hyperparameters,
        results={split: metrics for split, metrics in results.items() if metrics},
        training_time=recorded.get_training_duration_data().get("training_time") if trained else None,
        hardware=hardware() if trained else None,
        energy_kwh=recorded.get_codecarbon_data()["co2_eq_emissions"]["energy_consumed"] if carbon else None,
        language=recorded.language or None,
        license=recorded.license,
    ).render()


def brought_up_to_date(text: str, num_labels: int, repo_id: str | None = None) -> str:
    """A card with the number of labels that its model has by now, and the repository that it goes to, if to any.

    Nothing else changes: results are those that were measured, and a card of another make is left alone.
    """
    text, ours = re.subn(r"(?<=this model finds its labels among )\d+(,\d+)*", f"{num_labels:,}", text)
    if repo_id is None:
        return text
    was = re.search(r'XMCModel\.from_pretrained\("([^"]+)"', text)
    text = text.replace(f'"{was[1]}"', f'"{repo_id}"') if ours and was else text
    return text.replace(SOME_REPOSITORY, repo_id)


def describe_encoder(encoder: SentenceTransformer, base_model: str | None = None) -> str:
    """Describe an encoder in a few words."""
    if isinstance(encoder[0], StaticEmbedding):
        rows = encoder[0].embedding.num_embeddings
        return f"a static one: the mean of {rows:,} token vectors"
    model: Any = getattr(encoder[0], "auto_model", encoder[0])
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    kind = f"{kind}, from {base_model}" if base_model else kind
    merged = adapters_of(encoder)
    return f"{kind}, with {' and '.join(merged)} adapters merged into its weights" if merged else kind


def hardware() -> str:
    """The processors at hand, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
