"""Train in each label mode: validation P@1 by steps and by time, on the same batches, with dropout.

    python recipes/benchmarks/modes.py --data recipes/data/wordnet-hypernyms \
        --model sentence-transformers/all-MiniLM-L6-v2 --num_labels 2000 --seconds 400 --json modes.json

The modes take turns: the mode with the least time so far takes the next step, so that all share the same conditions.
Time is CPU time in training steps, which equals wall-clock time on one thread of an idle machine; evaluation does not
count. Labels of more than `--max_share` of the queries are left out, because P@1 would say little. With `--steps`, the
learning rate falls linearly to zero at the last step. The table at the end has means over `--seeds` (of batches,
dropout and draws), and the difference of each mode from the first one at the same seed and step. The plot is written
next to the JSON.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from subset import subset
from transformers import set_seed

from hf_xmc import XMCData, XMCEvaluator, XMCTrainer, XMCTrainingArguments, load_xmc, losses
from hf_xmc.cli import HelpFormatter

MODES = ("exact", "fresh", "bank", "mined")
METRICS = ("P@1", "P@5", "R@10")


class Run:
    """The encoder, optimizer and batches of one mode, advanced step by step."""

    def __init__(self, options: argparse.Namespace, data: XMCData, mode: str, seed: int) -> None:
        set_seed(seed)
        self.mode, self.steps, self.seconds, self.evaluated = mode, 0, 0.0, -options.eval_seconds
        self.encoder = SentenceTransformer(options.model)
        self.encoder.max_seq_length = options.max_seq_length
        args = XMCTrainingArguments(
            "runs/modes",
            label_mode=mode,
            label_sample_fraction=options.share,
            num_hard_negatives=0,
            num_random_negatives=int(options.share * data.num_labels),
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            learning_rate_mapping={"word_embeddings": rate} if (rate := options.word_learning_rate) else {},
            seed=seed,
            report_to="none",
            disable_tqdm=True,
        )
        loss = losses.DecoupledSoftmaxLoss(options.temperature)
        self.trainer = XMCTrainer(self.encoder, args, data.train, labels=data.labels, loss=loss)
        self.optimizer = self.trainer.create_optimizer()
        rate = lambda step: min(1.0, (step + 1) / options.warmup_steps, (options.steps - step) / options.steps)  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.batches = iter(())

    def step(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.trainer.get_train_dataloader())
            batch = next(self.batches)
        start = time.process_time()
        self.encoder.train()
        self.trainer.compute_loss(self.encoder, self.trainer._prepare_inputs(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds += time.process_time() - start
        self.steps += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--num_labels", type=int)
    parser.add_argument("--max_share", type=float, default=0.05)
    parser.add_argument("--max_seq_length", type=int, default=16)
    parser.add_argument("--validation_size", type=float, default=0.02, help="share of the training queries")
    parser.add_argument("--max_queries", type=int, default=1000, help="validation queries")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--share",
        type=float,
        default=0.1,
        help="fraction of the labels that fresh and bank draw, and mined draws at random",
    )
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--word_learning_rate", type=float, help="value for all modes; by default that of the trainer")
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600, help="seconds of training for each mode")
    parser.add_argument("--steps", type=int, default=2**31, help="maximum number for each mode")
    parser.add_argument("--eval_every", type=int, default=4, help="steps")
    parser.add_argument(
        "--eval_seconds", type=float, default=20, help="minimum seconds of training between evaluations"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    whole = load_xmc(options.data).carve_validation(options.validation_size)
    data = subset(whole, options.num_labels, max_share=options.max_share)
    some = data.validation.select(range(min(options.max_queries, len(data.validation))))
    data = replace(data, validation=some)
    evaluator = XMCEvaluator.from_data(data, "validation", recall_at=(10,))
    print(f"{data.num_labels} labels, {len(data.train)} queries, {len(data.validation)} to validate", flush=True)
    rows: list[dict] = []

    def evaluate(run: Run, seed: int) -> None:
        found = evaluator(run.encoder)
        row = {"mode": run.mode, "seed": seed, "steps": run.steps, "seconds": run.seconds}
        rows.append(row | {metric: 100 * found[metric] for metric in METRICS})
        run.evaluated = run.seconds
        print(rows[-1], flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
            plot(rows, options.json.with_suffix(".png"))

    for seed in options.seeds:
        runs = [Run(options, data, mode, seed) for mode in options.modes]
        for run in runs:
            evaluate(run, seed)
        while going := [run for run in runs if run.seconds < options.seconds and run.steps < options.steps]:
            run = min(going, key=lambda run: run.seconds)
            run.step()
            due = run.steps % options.eval_every == 0 and run.seconds - run.evaluated >= options.eval_seconds
            if due or run.seconds >= options.seconds or run.steps == options.steps:
                evaluate(run, seed)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Return means over the seeds if all have been measured, with the standard error of the mean."""
    found = {(row["mode"], row["steps"], row["seed"]): row for row in rows}
    seeds, modes = {row["seed"] for row in rows}, list(dict.fromkeys(row["mode"] for row in rows))
    lines = [f"| mode | steps | seconds | P@1 | less that of {modes[0]} | P@5 | R@10 |", "|---" * 7 + "|"]
    for mode, steps in sorted({key[:2] for key in found}, key=lambda key: (modes.index(key[0]), key[1])):
        mine = [found[mode, steps, seed] for seed in seeds if (mode, steps, seed) in found]
        first = [found[modes[0], steps, seed] for seed in seeds if (modes[0], steps, seed) in found]
        if len(mine) == len(seeds):
            seconds = statistics.mean(row["seconds"] for row in mine)
            p_at_1, *others = (mean([row[metric] for row in mine]) for metric in METRICS)
            beside = "-"
            if mode != modes[0] and len(first) == len(seeds):
                beside = mean([row["P@1"] - base["P@1"] for row, base in zip(mine, first, strict=True)])
            lines.append(f"| {mode} | {steps} | {seconds:.0f} | {p_at_1} | {beside} | {' | '.join(others)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def plot(rows: list[dict], path: Path) -> None:
    """Draw the mean P@1 of the seeds that were measured, by steps and by time."""
    first = [row for row in rows if row["mode"] == rows[0]["mode"]]
    a_step = sum(row["seconds"] for row in first) / max(1, sum(row["steps"] for row in first)) or 1.0
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for mode, steps in sorted(
        {(row["mode"], row["steps"]) for row in rows}, key=lambda key: (MODES.index(key[0]), key[1])
    ):
        same = [row for row in rows if (row["mode"], row["steps"]) == (mode, steps)]
        time_, p_at_1 = (statistics.mean(row[name] for row in same) for name in ("seconds", "P@1"))
        curves.setdefault(mode, []).append((steps, time_ / a_step, p_at_1))
    draw(curves, path, reference=rows[0]["mode"])


def draw(curves: dict[str, list[tuple[float, float, float]]], path: Path, reference: str = "exact") -> None:
    """Draw points ``(steps, time, P@1)`` of each mode; the unit of time is the mean step of the mode ``reference``."""
    from hf_xmc.experiment.plots import COLORS, legend, panels, style

    color = dict(zip(MODES, COLORS, strict=False))
    with style():
        figure, axes = panels(2, sharey=True)
        for mode, points in curves.items():
            steps, times, p_at_1 = zip(*points, strict=True)
            for axis, x in zip(axes[:, 0], (steps, times), strict=True):
                axis.plot(x, p_at_1, marker="o", label=mode, color=color[mode])
        longest = max(steps for steps, _, _ in curves[reference])
        axes[0, 0].set(title="P@1 on validation, %: at equal steps", xlabel="steps", xlim=(0, 1.05 * longest or None))
        axes[1, 0].set(title="At equal time", xlabel=f"time, in steps of {reference}")
        axes[1, 0].set_xlim(left=0)
        legend(figure, 4)
        figure.savefig(path)


if __name__ == "__main__":
    main()
