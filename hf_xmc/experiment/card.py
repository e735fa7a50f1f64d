"""The model card of a finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_xmc.data.dataset import XMCData
from hf_xmc.experiment.intervals import about_few_queries
from hf_xmc.experiment.splits import queries_to_show
from hf_xmc.hub.card import XMCCard, describe_encoder
from hf_xmc.hub.release import replace_card
from hf_xmc.model.model import XMCModel

SHOWN = (
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "seed",
)
FROM_SCRATCH = {
    "static": "a static encoder (the mean of token vectors)",
    "phrases": "a static encoder (the mean of the vectors of tokens and of phrases)",
}


def write_card(run: Path, full: XMCData, data_name: str, model: XMCModel | None = None, **about: Any) -> XMCCard:
    """Write the card of a finished run into its model folder, and return it.

    Args:
        run: The ``output_dir`` of the run.
        full: The data as they were loaded.
        data_name: Name of the data.
        model: The model of the run; loaded from the folder if it is not given.
        about: Further facts, such as ``name``, ``license``, ``language``, ``dataset_id``.
    """
    report = json.loads((run / "metrics.json").read_text())
    recipe, split = report["recipe"], report["split"]
    model = XMCModel.from_pretrained(run / "model") if model is None else model
    data, shown_split = queries_to_show(full, report)
    example = data.split(shown_split)["text"][0]
    shown = {name: report["arguments"][name] for name in SHOWN if report["arguments"].get(name) not in (None, -1)}
    from_scratch = recipe["model"] in FROM_SCRATCH
    card = XMCCard(
        num_labels=len(model.labels),
        embedding_dim=model.index.embedding_dim,
        similarity=model.encoder.similarity_fn_name,
        encoder=FROM_SCRATCH.get(recipe["model"]) or describe_encoder(model.encoder, recipe["model"]),
        base_model=None if from_scratch else recipe["model"],
        data=data_name,
        num_train=report["num_train"],
        label_vectors=model.label_vectors is not None,
        num_remembered=model.memory.relevance.shape[0] if model.memory else 0,
        loss=recipe["loss"],
        loss_settings={"temperature": recipe["temperature"]}
        | ({"k": recipe["k"]} if "top_k" in recipe["loss"] else {}),
        hyperparameters={
            "negatives": "all labels",
            "encoder before training": recipe["model"],
            "held out for validation": f"{100 * recipe['validation_size']:g} % of the training queries",
            **shown,
        },
        results={} if split is None else {split: report.get("memory", report["labels"])},
        variants={"without the training memory": report["labels"]} if "memory" in report else {},
        deciles=report["deciles"],
        training_time=f"{report['train_seconds']:.0f} seconds",
        hardware=report["hardware"],
        energy_kwh=report.get("energy_kwh"),
        about_scores=_about_scores(report),
        example=example,
        predictions=model.predict(example, 5),
        **about,
    )
    replace_card(run / "model", card)
    return card


def _about_scores(metrics: Mapping[str, Any]) -> str | None:
    if refused := metrics.get("not_calibrated"):
        return f"The scores are not calibrated: {refused}"
    return about_few_queries(metrics.get("calibration", {})) or None
