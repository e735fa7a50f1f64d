"""The folder of a run that is finished, without the training."""

import json

from datasets import Dataset

from helpers.tiny import LABELS, POSITIVES, make_static_encoder
from hf_xmc import XMCData, XMCModel
from hf_xmc.experiment.measure import complete
from hf_xmc.experiment.settings import ExperimentSettings

LOSSES = [{"epoch": step / 2, "loss": 9.0 - step, "step": step} for step in range(1, 5)]
EVALUATIONS = [{"epoch": epoch, "eval_P@1": 0.5, "eval_P@5": 0.2, "eval_R@100": 0.9} for epoch in (1.0, 2.0)]


def make_data(labels=LABELS, texts=None):
    texts = texts or [f"text {number} about {LABELS[ids[0]] if ids else 'and'}" for number, ids in enumerate(POSITIVES)]
    rows = Dataset.from_dict({"text": texts, "label_ids": POSITIVES})
    return XMCData(rows, Dataset.from_dict({"uid": [f"L{n}" for n in range(11)], "text": labels}), rows, rows)


def finished(folder, data, encoder=None, history=(*LOSSES, *EVALUATIONS), **changes):
    """Write the folder of a finished run."""
    settings = ExperimentSettings(data="my data/it's", **changes)
    model = XMCModel(encoder or make_static_encoder(), data.labels)
    metrics = {"split": None, "deciles": [], "train_seconds": 3.0, "hardware": "a CPU", "recipe": vars(settings)}
    metrics |= complete(model, data, data, settings)
    model.save_pretrained(folder / "model")
    (folder / "metrics.json").write_text(json.dumps(metrics, default=str))
    (folder / "history.json").write_text(json.dumps(list(history)))
    return model, metrics
