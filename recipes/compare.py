"""Compare losses, similarities and negatives on one short schedule, each with its best learning rate.

    python recipes/compare.py --data recipes/data/wordnet-hypernyms --output_dir runs/compare --num_labels 4000

With this number of labels, drawn at random, a run takes about ten seconds on a CPU core. Each finished run is a line of
`runs.jsonl` and is not repeated, so you can stop at any time, or pass `--seconds`. `tables.md` and `compare.png` are
rewritten at the end from all lines.

The learning rate of a loss is the best of `--learning_rates` on validation queries taken from train, for the metric
that the loss optimizes. The loss then runs with every seed. Test queries are measured in every run, but do not affect
any choice; if the data have none, the validation queries are measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from benchmarks.subset import subset
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer
from transformers import set_seed

from hf_xmc import (
    HardNegativeMiner,
    XMCData,
    XMCEvaluator,
    XMCTrainer,
    XMCTrainingArguments,
    load_xmc,
    losses,
)
from hf_xmc.cli import HelpFormatter
from hf_xmc.encoders.static import encoder_of, train_tokenizer
from hf_xmc.experiment.splits import has_labels, has_propensity, hold_out, split_to_measure
from hf_xmc.hub.card import hardware
from hf_xmc.metrics.frequency import by_frequency_decile, label_counts

LOSSES = {
    "decoupled softmax": lambda t: losses.DecoupledSoftmaxLoss(temperature=t),
    "softmax": lambda t: losses.SoftmaxLoss(temperature=t),
    "BCE": lambda t: losses.BCELoss(temperature=t, bias=None),
    "BCE, bias and scale": lambda t: losses.BCELoss(temperature=t),
    "SoftTop-5": lambda t: losses.SoftTopKLoss(k=5, temperature=t),
    "SoftTop-100": lambda t: losses.SoftTopKLoss(k=100, temperature=t),
}
AIM = {"SoftTop-100": "R@100"}  # metric for choosing the learning rate; nDCG@5 for other losses
METRICS = ("P@1", "P@3", "P@5", "PSP@5", "nDCG@5", "R@10", "R@100")
COSINE = ("decoupled softmax", "softmax", "BCE, bias and scale", "SoftTop-5")
RANDOM = (0, 200, 1000, 5000)
HARD = (0, 1, 5, 10)


def plan(results: list[dict], options: argparse.Namespace) -> Iterator[dict]:
    """Return the runs in order. Runs that need the best learning rate of other runs come after those."""
    first = options.seeds[0]

    def grid(study: str, loss: str, **settings: object) -> Iterator[dict]:
        for rate in options.learning_rates:
            yield {"study": study, "loss": loss, "learning_rate": rate, "seed": first, **settings}

    def best(study: str, loss: str, **settings: object) -> Iterator[dict]:
        rate = best_rate(results, tuned_in(study), loss, len(options.learning_rates))
        if rate is not None:
            for seed in options.seeds:
                yield {"study": study, "loss": loss, "learning_rate": rate, "seed": seed, **settings}

    for study, names in (("losses", LOSSES), ("cosine", COSINE)):
        for loss in names:
            yield from grid(study, loss)
        for loss in names:
            yield from best(study, loss)
    for number in RANDOM:
        for loss in ("decoupled softmax", "softmax"):
            yield from best("negatives", loss, random=number)
    for number in HARD:
        yield from best("hard", "decoupled softmax", random=0, hard=number)


def tuned_in(study: str) -> str:
    """Return the study from which another one takes its learning rates."""
    return "cosine" if study == "cosine" else "losses"


def best_rate(results: list[dict], study: str, loss: str, tried: int) -> float | None:
    """Return the best learning rate on validation, once all have been tried with the first seed."""
    mine = [result for result in results if result["run"]["study"] == study and result["run"]["loss"] == loss]
    if len({result["run"]["learning_rate"] for result in mine}) < tried:
        return None
    if tried == 1:  # nothing to choose, so no validation queries are needed
        return mine[0]["run"]["learning_rate"]
    aim = AIM.get(loss, "nDCG@5")
    return max(mine, key=lambda result: result["validation"][aim])["run"]["learning_rate"]


def train(run: dict, data: XMCData, tokenizer: Tokenizer, options: argparse.Namespace) -> dict:
    """Run once, and return metrics on validation and test, and test hits by label frequency."""
    set_seed(run["seed"])
    texts = [*data.train["text"][:], *data.labels["text"][:]]
    encoder = encoder_of(tokenizer, texts, options.embedding_dim, std=0.3, seed=run["seed"], device=None)
    cosine = run["study"] == "cosine"
    if cosine:
        encoder.append(Normalize())
    args = XMCTrainingArguments(
        str(options.output_dir / "trainer"),
        label_mode="mined" if "random" in run else "exact",
        num_random_negatives=run.get("random", 0),
        num_hard_negatives=run.get("hard", 0),
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        learning_rate=run["learning_rate"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=run["seed"],
    )
    loss = LOSSES[run["loss"]](options.temperature if cosine else 1.0)
    trainer = XMCTrainer(encoder, args, data.train, labels=data.labels, loss=loss)
    if run.get("hard"):
        trainer.add_callback(HardNegativeMiner(trainer, start=1, every=1))
    start = time.perf_counter()
    trainer.train()
    found: dict = {"run": run, "seconds": time.perf_counter() - start, "deciles": []}
    for split in ("validation", "test"):
        if not has_labels(data, split):
            continue
        evaluator = XMCEvaluator.from_data(data, split)
        predictions = evaluator.predict(encoder)
        metrics = evaluator.score(predictions)
        found[split] = {metric: metrics[metric] for metric in METRICS}
        if np.count_nonzero(label_counts(evaluator.relevance)) >= 10:
            deciles = by_frequency_decile(predictions.label_ids, evaluator.relevance, data.label_counts())
            found["deciles"] = [decile._asdict() for decile in deciles]
    return found | {"test": found.get("test", found.get("validation"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this many seconds")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument(
        "--num_labels", type=int, help="number of labels to draw at random, with the queries that have any of them"
    )
    parser.add_argument("--embedding_dim", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.05, help="of cosines")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation_size", type=float, default=0.05)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    store = options.output_dir / "runs.jsonl"
    results = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    data, start = None, time.perf_counter()  # not read if there is nothing to run
    while time.perf_counter() - start < options.seconds:
        done = [result["run"] for result in results]
        run = next((run for run in plan(results, options) if run not in done), None)
        if run is None:
            break
        if data is None:
            data = load(options)
            check(data, options)
            tokenizer = train_tokenizer([*data.train["text"][:], *data.labels["text"][:]])
        results.append(train(run, data, tokenizer, options) | {"hardware": hardware()})
        with store.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        shown = {metric: round(100 * value, 2) for metric, value in results[-1]["test"].items()}
        print(run, f"{results[-1]['seconds']:.0f} s", shown, flush=True)
    (options.output_dir / "tables.md").write_text(tables(results, options))
    plot(results, options, options.output_dir / "compare.png")
    print((options.output_dir / "tables.md").read_text())


def load(options: argparse.Namespace) -> XMCData:
    data = load_xmc(options.data)
    data = hold_out(data, options.validation_size)
    return data if options.num_labels is None else subset(data, options.num_labels)


def check(data: XMCData, options: argparse.Namespace) -> None:
    """Raise before the first run if the data lack something that the runs need."""
    if not has_labels(data, "validation") and len(options.learning_rates) > 1:
        raise SystemExit(
            "choosing a learning rate needs validation queries with labels, got none. Pass a single value of "
            "--learning_rates, or a --validation_size above 0."
        )
    if split_to_measure(data) is None:
        raise SystemExit(1)
    if not has_propensity(data):
        raise SystemExit(f"PSP@5 needs at least 3 training queries, got {len(data.train)}.")


def with_deciles(runs: list[dict]) -> list[dict]:
    """Return the runs that were measured by label frequency, which needs ten labels."""
    return [run for run in runs if run["deciles"]]


def chosen(results: list[dict], options: argparse.Namespace, study: str, loss: str, **settings: object) -> list[dict]:
    """Return the runs of a row: those with the best learning rate, one per seed."""
    rate = best_rate(results, tuned_in(study), loss, len(options.learning_rates))
    wanted = {"study": study, "loss": loss, "learning_rate": rate, **settings}
    return [result for result in results if {**result["run"], "seed": None} == {**wanted, "seed": None}]


def tables(results: list[dict], options: argparse.Namespace) -> str:
    """Return all studies in Markdown: mean and standard deviation over the seeds, in percent, on test."""
    head = ["| | learning rate | seeds | " + " | ".join(METRICS) + " |", "|---" * (3 + len(METRICS)) + "|"]
    sections = {
        "Losses": [(loss, chosen(results, options, "losses", loss)) for loss in LOSSES],
        "Cosines": [(loss, chosen(results, options, "cosine", loss)) for loss in COSINE],
        "Random negatives": [
            (f"{loss}, {number}", chosen(results, options, "negatives", loss, random=number))
            for loss in ("decoupled softmax", "softmax")
            for number in RANDOM
        ],
        "Hard negatives": [
            (str(number), chosen(results, options, "hard", "decoupled softmax", random=0, hard=number))
            for number in HARD
        ],
    }
    lines = []
    for title, rows in sections.items():
        lines += [f"**{title}**", "", *head]
        for name, runs in rows:
            if runs:
                cells = [spread([run["test"][metric] for run in runs]) for metric in METRICS]
                lines.append(f"| {name} | {runs[0]['run']['learning_rate']:g} | {len(runs)} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["**R@100 by label frequency, rarest tenth first**", ""]
    for loss in LOSSES:
        if runs := with_deciles(chosen(results, options, "losses", loss)):
            cells = [spread([run["deciles"][tenth]["recall"] for run in runs]) for tenth in range(10)]
            lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


def plot(results: list[dict], options: argparse.Namespace, path: Path) -> None:
    """Draw R@100 by label frequency, and P@1 by the number of random negatives."""
    recall, precision = {}, {}
    for loss in LOSSES:
        if runs := with_deciles(chosen(results, options, "losses", loss)):
            recall[loss] = [
                100 * statistics.mean(run["deciles"][tenth]["recall"] for run in runs) for tenth in range(10)
            ]
    for loss in ("decoupled softmax", "softmax"):
        rows = [(f"{number:,}", chosen(results, options, "negatives", loss, random=number)) for number in RANDOM]
        rows.append(("all", chosen(results, options, "losses", loss)))
        values = {name: [100 * run["test"]["P@1"] for run in runs] for name, runs in rows if runs}
        precision[loss] = [
            (name, statistics.mean(value), statistics.stdev(value) if len(value) > 1 else 0.0)
            for name, value in values.items()
        ]
    draw(recall, precision, path)


def draw(recall: dict[str, list[float]], precision: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Draw R@100 of ten groups of labels, and P@1 with its standard deviation by the number of negatives."""
    from hf_xmc.experiment.plots import COLORS, legend, panels, style

    color = dict(zip(LOSSES, COLORS, strict=True))
    with style():
        figure, axes = panels(2)
        top, bottom = axes[:, 0]
        for loss, means in recall.items():
            top.plot(range(1, 11), means, marker="o", label=loss, color=color[loss])
        top.set(xlabel="labels by frequency in training, tenths", title="R@100, %", ylim=(-2, 102), xticks=range(1, 11))
        for loss, points in precision.items():
            if points:
                bottom.errorbar(*zip(*points, strict=True), marker="o", label=loss, color=color[loss])
        bottom.set(xlabel="random labels in addition to those of the batch", title="P@1, %")
        legend(figure)
        figure.savefig(path)


if __name__ == "__main__":
    main()
