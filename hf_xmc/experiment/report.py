"""A report on a finished run, for readers without knowledge of machine learning."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from hf_xmc.data.dataset import XMCData
from hf_xmc.experiment.baselines import MOST_FREQUENT, measure_baselines
from hf_xmc.experiment.intervals import about_few_queries, range_of
from hf_xmc.experiment.report_examples import draw_examples, shorten
from hf_xmc.experiment.report_plots import frequency_plots, training_plots
from hf_xmc.experiment.splits import has_propensity, queries_to_show
from hf_xmc.metrics.frequency import PROPENSITY_PRESETS, inverse_propensity
from hf_xmc.model.model import XMCModel

TEMPLATE = Path(__file__).with_name("report_template.html")
OURS = "This model"
SPLIT_NAMES = {"train": "training"}
METRICS = {  # one sentence per metric
    "P@1": "How often the first label is correct.",
    "P@3": "Share of correct labels among the first 3 labels of a text.",
    "P@5": "Share of correct labels among the first 5 labels of a text.",
    "R@10": "Share of the correct labels of a text that are among the first 10.",
    "R@100": "Share of the correct labels of a text that are among the first 100.",
    "nDCG@5": "100 if the best possible labels come first, up to 5 per text; mistakes at the top cost most.",
    "PSP@1": "Like P@1, but a correct label counts more if it is rare in training.",
    "PSP@3": "Like P@3, but a correct label counts more if it is rare in training.",
    "PSP@5": "Like P@5, but a correct label counts more if it is rare in training.",
}


def write_report(
    run: Path, full: XMCData, name: str, peers_file: Path | None = None, model: XMCModel | None = None
) -> Path:
    """Write ``report.html``, a self-contained file, into the folder of a finished run, and return its path.

    Args:
        run: The ``output_dir`` of the run.
        full: The data as they were loaded.
        name: Name of the data.
        peers_file: Metrics of other systems on the same data, as JSON.
        model: The model of the run; loaded from the folder if it is not given.
    """
    metrics = json.loads((run / "metrics.json").read_text())
    data, split = queries_to_show(full, metrics)
    history = json.loads((run / "history.json").read_text())
    model = XMCModel.from_pretrained(run / "model") if model is None else model
    examples = draw_examples(model, data, split)
    page: dict[str, Any] = {
        "name": name,
        "split": split,
        "shown_split": SPLIT_NAMES.get(split, split),
        "facts": facts(metrics, data, split),
        "lead": [f"Given a text, this model finds its correct labels among {data.num_labels:,}."],
        "tables": [],
        "calibration": calibration(metrics.get("calibration"), metrics.get("not_calibrated")),
        "plots": [*training_plots(history), *frequency_plots(metrics["deciles"])],
        "examples": examples,
        "probabilities": model.calibration is not None,
        "highlighted": any(piece.heat for example in examples for piece in example.pieces),
        "commands": commands(run / "model", data.split(split)["text"][0], metrics["recipe"]["data"], split),
    }
    if metrics["split"] is not None:
        page |= measured(metrics, data if split == "validation" else full, peers_file)
    if (zero_shot := run.parent / "zero_shot" / "zero_shot.json").exists():
        page["tables"].append(unseen_labels(json.loads(zero_shot.read_text())))
    path = run / "report.html"
    path.write_text(_environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(page), encoding="utf-8")
    return path


def _environment() -> Environment:
    environment = Environment(autoescape=True, trim_blocks=False)
    environment.filters["percent"] = percent
    return environment


def percent(probability: float) -> str:
    """Return a probability as a whole percentage.

    >>> percent(0.123), percent(0.001), percent(0.999), percent(1.0)
    ('12%', 'under 1%', 'over 99%', '100%')
    """
    if 0 < probability < 0.01:
        return "under 1%"
    return "over 99%" if 0.99 < probability < 1 else f"{100 * probability:.0f}%"


def facts(metrics: Mapping[str, Any], data: XMCData, split: str) -> str:
    """Return the size of the data, and how the model was trained."""
    recipe = metrics["recipe"]
    queries = ", ".join(
        f"{len(data.split(part)):,} {SPLIT_NAMES.get(part, part)} texts" for part in dict.fromkeys(("train", split))
    )
    repeated = metrics.get("also_in_train", {}).get(split, 0)
    also = f" {repeated:,} {SPLIT_NAMES.get(split, split)} texts are training texts too." if repeated else ""
    return (
        f"{queries}, {data.num_labels:,} labels.{also} Encoder: {recipe['model']}. Loss: {recipe['loss']}. Training "
        f"took {metrics['train_seconds']:,.0f} seconds on {metrics['hardware']}."
    )


def measured(metrics: Mapping[str, Any], data: XMCData, peers_file: Path | None) -> dict[str, Any]:
    """Return the metrics of the model and of simple methods, a summary, and a table of other systems."""
    split, ours = metrics["split"], metrics.get("memory", metrics["labels"])
    rarity = None
    if has_propensity(data):
        a, b = PROPENSITY_PRESETS[metrics["recipe"]["propensity"]]
        rarity = inverse_propensity(data.label_counts(), len(data.train), a, b)
    simple = measure_baselines(data, split, rarity)
    systems = {OURS: ours, **simple}
    shown = [name for name in METRICS if name in ours]
    others, best = list(simple), {name: max(simple, key=lambda key: simple[key][name]) for name in shown}
    lead = [
        f"Given a text, this model finds its correct labels among {data.num_labels:,}. Its first label is "
        f"correct for {100 * ours['P@1']:.0f} of 100 texts. The most frequent label is correct for "
        f"{100 * simple[MOST_FREQUENT]['P@1']:.0f}."
    ]
    if len(others) > 1:
        at, its = best["P@1"], simple[best["P@1"]]["P@1"]
        better = " That is better than this model: more epochs or dimensions may help." if its > ours["P@1"] else ""
        lead.append(f"The best simple method ({at}) is correct for {100 * its:.0f}.{better}")
    rows = [
        {
            "name": name,
            "sentence": sentence_on(name, data, split),
            "cells": [f"{100 * system[name]:.1f}" for system in systems.values()],
        }
        for name in shown
    ]
    notes = [
        "Most similar training texts: the 20 nearest texts, by tf-idf of words and pairs of words, vote for labels."
    ]
    return {
        "lead": lead,
        "systems": [system[0].upper() + system[1:] for system in systems],
        "metrics": rows,
        "notes": notes if len(others) > 1 else [],
        "tables": [all_systems(metrics, simple, peers_file)],
    }


def sentence_on(metric: str, data: XMCData, split: str) -> str:
    """Return the sentence about a metric, and the largest possible value of P@k if it is not near 100 %."""
    kind, k = metric.split("@")
    size = np.diff(data.relevance(split).indptr)
    largest = np.minimum(size[size > 0], int(k)).mean() / int(k)
    few = kind == "P" and largest < 0.95
    return METRICS[metric] + (
        f" At most {100 * largest:.1f} here, because many texts have fewer labels." if few else ""
    )


def all_systems(
    metrics: Mapping[str, Any], simple: Mapping[str, Mapping[str, float]], peers_file: Path | None
) -> tuple[str, dict[str, Any]]:
    """Return a table of all systems, with those of ``peers_file`` last."""
    peers: dict[str, Any] = {"percent": {}, "note": ""}
    if peers_file and peers_file.exists():
        peers = json.loads(peers_file.read_text())
    ways = {"hf_xmc, labels": "labels", "hf_xmc, labels and memory": "memory"}
    fractions = {name: metrics[way] for name, way in ways.items() if way in metrics} | dict(simple)
    rows = {name: {at: 100 * value for at, value in values.items()} for name, values in fractions.items()}
    rows |= {name if name not in rows else f"{name}, published": values for name, values in peers["percent"].items()}
    columns = [name for name in METRICS if name in metrics["labels"]]
    caption = "In percent. With memory, the nearest training texts also vote for labels."
    table = {
        "caption": f"{caption} {peers['note']}".strip(),
        "heads": ["System", *columns],
        "rows": [
            [system, *(f"{values[name]:.2f}" if name in values else "" for name in columns)]
            for system, values in rows.items()
        ],
        "ours": list(ways),
    }
    return "All systems and metrics", table


def calibration(found: Mapping[str, Any] | None, refused: str | None) -> dict[str, Any] | None:
    """Return the calibration error, and the precision at the thresholds; or why the model is not calibrated."""
    if found is None and refused:
        return {"sentence": f"The scores are not probabilities, and no thresholds are chosen: {refused}"}
    if found is None:
        return None
    sentence = (
        f"About 70% of the labels with a probability of 70% should be correct. On the {found['split']} texts, "
        f"the probabilities of the first five labels are off by {100 * found['ECE@5']:.1f} points on average "
        f"(expected calibration error; {100 * found['ECE@5 before']:.1f} before calibration)."
    )
    if about := about_few_queries(found):
        sentence += " " + about
    ranges = [row["interval"] for row in found["thresholds"] if "interval" in row]
    rows = [
        [
            f"{100 * row['wanted']:.0f}%",
            f"{100 * row['threshold']:.0f}%",
            "no label" if row["precision"] is None else f"{100 * row['precision']:.1f}%",
            *([range_of(row["interval"])] if ranges else []),
            f"{row['labels_per_text']:.1f}",
        ]
        for row in found["thresholds"]
    ]
    return {"sentence": sentence, "rows": rows, "ranges": bool(ranges)}


def unseen_labels(found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the table of ``recipes/zero_shot.py``."""
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in found["columns"].items())
    rows = [
        [system, *(f"{100 * metrics[name]:.2f}" if name in metrics else "" for name in found["columns"])]
        for system, metrics in found["systems"].items()
    ]
    caption = (
        f"{found['num_new']:,} labels were not seen in training and were added later by their text, next to "
        f"{found['num_seen']:,} labels seen in training; percent. {meanings}."
    )
    table = {"caption": caption, "heads": ["System", *found["columns"]], "rows": rows, "ours": []}
    return "Labels that training never saw", table


def commands(model: Path, text: str, data: str, split: str) -> list[tuple[str, str]]:
    """Return three shell commands that use a model, each with a description."""
    folder = shlex.quote(str(model.resolve()))
    line = shlex.quote(shorten(" ".join(text.split()), 120))
    return [
        ("Label a text, and show which words matter:", f"hf-xmc predict {folder} {line} --explain"),
        (
            "Label a file with one text per line:",
            f"hf-xmc predict {folder} --file texts.txt --output answers.jsonl",
        ),
        (
            "Measure the model again, on this or other data with the same labels:",
            f"hf-xmc evaluate {folder} {shlex.quote(data)}" + (f" --split {split}" if split != "test" else ""),
        ),
    ]
