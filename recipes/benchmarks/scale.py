"""Measure training with many labels: time per step and peak memory by number of labels, in each label mode.

    python recipes/benchmarks/scale.py --labels 131073 1305265 --json scale.json

Texts are generated: a label is a few words, and a query shares words with its labels. The encoder is static and costs
next to nothing, so the result shows the cost of the labels: embeddings, gradients and scores. Each line is a separate
process that trains `--steps` steps with :class:`hf_xmc.XMCTrainer`. Memory is the peak of the process, and the part
added after the texts were generated. The last column is the number of labels at which a linear fit reaches
`--memory_gib`. The plot is written next to the JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_xmc import XMCTrainer, XMCTrainingArguments, losses, static_encoder
from hf_xmc.cli import HelpFormatter

MODES = {
    "exact": {},
    "fresh": {"label_sample_fraction": 0.05},
    "bank": {"label_sample_fraction": 0.01},
    "mined": {"num_hard_negatives": 0, "num_random_negatives": 6000},
}
GIB = 2**30


def generate(num_labels: int, num_queries: int, seed: int = 0) -> tuple[Dataset, list[str]]:
    rng = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "ne", "pu", "ra", "so", "ti", "ve", "zu", "ben", "dor", "fal", "gim", "hul", "jer"]
    words = np.array([a + b + c for a in syllables for b in syllables for c in syllables])
    labels = [" ".join(words[row]) for row in rng.integers(0, len(words), (num_labels, 4))]
    positives = rng.integers(0, num_labels, (num_queries, 3))
    texts = [" ".join(word for label in ids for word in labels[label].split()[:2]) for ids in positives]
    return Dataset.from_dict({"text": texts, "label_ids": [sorted(set(ids.tolist())) for ids in positives]}), labels


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def measure(options: argparse.Namespace, mode: str, num_labels: int) -> dict:
    torch.set_num_threads(options.threads)
    queries, labels = generate(num_labels, options.steps * options.batch_size)
    encoder = static_encoder([*queries["text"], *labels[:20_000]], embedding_dim=options.embedding_dim, vocab_size=8000)
    before = peak()
    args = XMCTrainingArguments(
        "runs/scale",
        label_mode=mode,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=1,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **MODES[mode],
    )
    clock = Clock()
    start = time.perf_counter()
    trainer = XMCTrainer(encoder, args, queries, labels=labels, loss=losses.DecoupledSoftmaxLoss(), callbacks=[clock])
    result = trainer.train()
    return {
        "mode": mode,
        "labels": num_labels,
        "steps": len(clock.seconds),
        "seconds": float(np.median(clock.seconds[1:] or clock.seconds)),
        "total_seconds": time.perf_counter() - start,
        "peak_gib": peak() / GIB,
        "added_gib": (peak() - before) / GIB,
        "loss": result.training_loss,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[131_073, 1_305_265])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--embedding_dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--memory_gib", type=float, default=24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what a child process measures
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
        return
    rows = []
    for num_labels in options.labels:
        for mode in options.modes:
            command = [sys.executable, *sys.argv, "--one", mode, str(num_labels)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append({"mode": mode, "labels": num_labels, "error": done.stderr.strip().splitlines()[-1:]})
            else:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows, options.memory_gib))
    if options.json:
        plot(rows, options.json.with_suffix(".png"))


def table(rows: list[dict], memory_gib: float) -> str:
    lines = ["| mode | labels | seconds per step | peak GiB | added GiB | labels that fit |", "|---" * 6 + "|"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode and "error" not in row]
        fit = "-"
        if len(chosen) > 1:
            slope, base = np.polyfit([row["labels"] for row in chosen], [row["peak_gib"] for row in chosen], 1)
            fit = f"{(memory_gib - base) / slope / 1e6:.0f} million"
        for row in chosen:
            lines.append(
                f"| {mode} | {row['labels']:,} | {row['seconds']:.2f} | {row['peak_gib']:.2f} | "
                f"{row['added_gib']:.2f} | {fit} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    from hf_xmc.experiment.plots import legend, panels, style

    with style():
        figure, axes = panels(2, sharex=True)
        for mode in dict.fromkeys(row["mode"] for row in rows):
            chosen = [row for row in rows if row["mode"] == mode and "error" not in row]
            for axis, y in zip(axes[:, 0], ("seconds", "peak_gib"), strict=True):
                axis.loglog([row["labels"] for row in chosen], [row[y] for row in chosen], marker="o", label=mode)
        axes[0, 0].set_title("Seconds per step")
        axes[1, 0].set(title="Peak memory of the process, GiB", xlabel="labels")
        legend(figure, 4)
        figure.savefig(path)


if __name__ == "__main__":
    main()
