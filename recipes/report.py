"""A page on a finished run: its curve, its metrics beside other systems', label frequencies, and ten predictions.

python recipes/report.py --run runs/demo --data recipes/data/wordnet-hypernyms
"""

import argparse
import html
import json
from pathlib import Path

import numpy as np
import train
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_xmc import XMCData, XMCModel, load_xmc
from hf_xmc.cli import HelpFormatter

COLUMNS = ["P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10", "R@100"]
NUM_EXAMPLES, TOP_K, SHOWN = 10, 5, 160
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .ours { font-weight: 600; background: #eef5ff }
img { max-width: 100% } .score { color: #777 } .right { color: #06752a } li { margin: .1rem 0 } small { color: #666 }
"""


def write(run: Path, data_folder: str) -> Path:
    """Write ``report.html`` and its plots into the run's folder."""
    metrics = json.loads((run / "metrics.json").read_text())
    history = json.loads((run / "history.json").read_text())
    data, split = train.queries_to_show(load_xmc(data_folder), metrics)
    plot_training(history, run / "training.png")
    recipe = metrics["recipe"]
    queries = ", ".join(f"{len(data.split(name)):,} {name} queries" for name in dict.fromkeys(("train", split)))
    page = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(Path(data_folder).name)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(Path(data_folder).name)}</h1>",
        f"<p>{queries}, {data.num_labels:,} labels. Model <b>{html.escape(recipe['model'])}</b>, loss "
        f"<b>{html.escape(recipe['loss'])}</b>, all labels as negatives; trained in "
        f"{metrics['train_seconds']:.0f} s.</p>",
        *measured(metrics, Path(data_folder) / "peers.json"),
        *probabilities(metrics.get("calibration")),
        *zero_shot(run.parent / "zero_shot" / "zero_shot.json"),
        "<h2>Training</h2><img src='training.png' alt='loss and validation metrics by epoch'>",
        *by_frequency(metrics["deciles"], split, run / "deciles.png"),
        f"<h2>{NUM_EXAMPLES} {split} queries</h2><p>Drawn at random. Labels that are right are "
        "<span class='right'>green</span>.</p>",
        *examples(XMCModel.from_pretrained(run / "model"), data, split),
    ]
    path = run / "report.html"
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def measured(metrics: dict, peers_file: Path) -> list[str]:
    """Return the metrics, or a note that nothing was measured."""
    if metrics["split"] is None:
        return ["<p>Nothing was measured: the data have no test or validation queries with labels.</p>"]
    return [f"<h2>On the {metrics['split']} split</h2>", table(metrics, peers_file)]


def table(metrics: dict, peers_file: Path) -> str:
    """Metrics in percent, ours above those of other systems where the data comes with such a file."""
    peers = json.loads(peers_file.read_text()) if peers_file.exists() else {"percent": {}, "note": ""}
    ways = {"hf_xmc, labels": "labels", "hf_xmc, labels and memory": "memory"}
    ours = {name: metrics[way] for name, way in ways.items() if way in metrics}
    rows = {name: {at: 100 * value for at, value in values.items()} for name, values in ours.items()}
    rows |= peers["percent"]
    columns = [name for name in COLUMNS if name in metrics["labels"]]
    lines = ["<table><tr><th></th>", *(f"<th>{name}</th>" for name in columns), "</tr>"]
    for system, values in rows.items():
        lines.append(f"<tr{' class=ours' if system in ours else ''}><td>{html.escape(system)}</td>")
        lines += [f"<td>{values[name]:.2f}</td>" if name in values else "<td></td>" for name in columns]
        lines.append("</tr>")
    return "".join(lines) + f"</table><p><small>{html.escape(peers['note'])}</small></p>"


def probabilities(calibration: dict | None) -> list[str]:
    """What calibration gives on queries that it was not fitted on."""
    if calibration is None:
        return []
    lines = [
        f"<h2>Probabilities</h2><p>Expected calibration error of the first five labels, {calibration['split']} split: "
        f"{calibration['ECE@5 before']:.3f} before calibration, <b>{calibration['ECE@5']:.3f}</b> after. Thresholds "
        f"chosen on validation for a precision, among the first {calibration['labels_of_a_text']} labels:</p>",
        "<table><tr><th>wanted</th><th>threshold</th><th>reached</th><th>labels a text</th></tr>",
    ]
    for row in calibration["thresholds"]:
        reached = "-" if row["precision"] is None else f"{100 * row['precision']:.1f} %"
        lines.append(
            f"<tr><td>{100 * row['wanted']:.0f} %</td><td>{row['threshold']:.3f}</td><td>{reached}</td>"
            f"<td>{row['labels_per_text']:.1f}</td></tr>"
        )
    return [*lines, "</table>"]


def zero_shot(path: Path) -> list[str]:
    """The table of ``zero_shot.py``, where it was run beside this run."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    lines = [
        f"<h2>Labels that training never saw</h2><p>{report['num_hidden']:,} labels hidden from training and added by "
        f"text afterwards, beside {report['num_seen']:,} seen ones; percent.</p><table><tr><th></th>",
        *(f"<th title='{html.escape(meaning)}'>{name}</th>" for name, meaning in report["columns"].items()),
        "</tr>",
    ]
    for system, metrics in report["systems"].items():
        cells = "".join(
            f"<td>{100 * metrics[name]:.2f}</td>" if name in metrics else "<td></td>" for name in report["columns"]
        )
        lines.append(f"<tr><td>{html.escape(system)}</td>{cells}</tr>")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in report["columns"].items())
    return [*lines, f"</table><p><small>{html.escape(meanings)}.</small></p>"]


def plot_training(history: list[dict], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry for entry in history if "loss" in entry]
    left.plot([entry["epoch"] for entry in steps], [entry["loss"] for entry in steps], color="#1f5fbf")
    left.set(xlabel="epoch", ylabel="training loss")
    evaluations = [entry for entry in history if "eval_P@5" in entry]
    for name in ("P@1", "P@5", "R@100"):
        points = [(entry["epoch"], 100 * entry[f"eval_{name}"]) for entry in evaluations if f"eval_{name}" in entry]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set(xlabel="epoch", ylabel="validation, %")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    if evaluations:
        right.legend()
    finish(figure, path)


def by_frequency(deciles: list[dict], split: str, path: Path) -> list[str]:
    if not deciles:  # fewer than ten labels: no groups
        return []
    plot_deciles(deciles, path)
    return [
        f"<h2>By label frequency</h2><p>The labels of the {split} split in ten equal groups, from the rarest in "
        f"training to the most frequent.</p><img src='{path.name}' alt='hits by label frequency'>"
    ]


def plot_deciles(deciles: list[dict], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(deciles))
    precision = [100 * decile["precision"] for decile in deciles]
    recall = [100 * decile["recall"] for decile in deciles]
    first = axes.bar(places - 0.2, precision, 0.4, color="#1f5fbf", label="share of P@5, points")
    second = axes.bar(places + 0.2, recall, 0.4, color="#9dbfee", label="R@100, % of the group's positives")
    axes.bar_label(first, fmt="%.1f", fontsize=8)
    axes.bar_label(second, fmt="%.0f", fontsize=8)
    names = [
        f"{d['min_count']}" if d["min_count"] == d["max_count"] else f"{d['min_count']}-{d['max_count']}"
        for d in deciles
    ]
    axes.set_xticks(places, names, fontsize=8)
    axes.set(xlabel="training queries a label", ylim=(0, 108))
    axes.legend()
    finish(figure, path)


def finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def examples(model: XMCModel, data: XMCData, split: str) -> list[str]:
    rows = data.split(split)
    chosen = np.random.default_rng(0).choice(len(rows), min(NUM_EXAMPLES, len(rows)), replace=False)
    sample = rows.select(chosen)
    pairs = data.filter_pairs.get(split, np.empty((0, 2), dtype=np.int64))
    exclude = [(place, label) for place, row in enumerate(chosen) for label in pairs[pairs[:, 0] == row, 1]]
    found = model.search(list(sample["text"]), TOP_K, exclude=np.array(exclude, dtype=np.int64).reshape(-1, 2))
    texts = model.labels["text"]
    blocks = []
    for row, label_ids, scores in zip(sample, *found, strict=True):
        truth = set(row["label_ids"])
        blocks.append(f"<p><b>{html.escape(shorten(row['text']))}</b> <small>({len(truth)} right labels)</small><ul>")
        for label, score in zip(label_ids[label_ids >= 0].tolist(), scores.tolist(), strict=False):
            right = " class='right'" if label in truth else ""
            blocks.append(
                f"<li{right}>{html.escape(shorten(texts[label]))} <span class='score'>{score:.2f}</span></li>"
            )
        blocks.append("</ul>")
    return blocks


def shorten(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the output_dir of a finished training")
    parser.add_argument("--data", required=True, help="the data set it was trained on")
    arguments = parser.parse_args()
    print(write(arguments.run, arguments.data))
