"""Compare a training step in each label mode with the exact step on the same batch: gradient, time and encoder work.

    python recipes/benchmarks/step.py --data recipes/data/wordnet-hypernyms \
        --model sentence-transformers/all-MiniLM-L6-v2 --num_labels 6000 --warm_steps 0 60 --json step.json

The gradient is that of all parameters, without dropout: two exact gradients differ under different masks, and
`--dropout` shows by how much. Work is the number of tokens in forward passes of the encoder; a backward pass counts
twice, and 1.00x is the exact step. The bank of a trained encoder is that at the end of training, with rows of different
ages. Modes take turns in one process. Seconds are CPU time (wall-clock time on a GPU), and ratios are relative to the
exact step of the same batch. The plot is written next to the JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from subset import subset
from transformers import set_seed

from hf_xmc import XMCData, XMCTrainer, XMCTrainingArguments, load_xmc, losses
from hf_xmc.cli import HelpFormatter
from hf_xmc.training.negatives import ScoredLabels

Work = dict[str, float]
MEANS = ("cosine", "length", "embedded", "time", "work")


def make_trainer(options: argparse.Namespace, encoder: SentenceTransformer, data: XMCData, mode: str, **settings):
    args = XMCTrainingArguments(
        "runs/step",
        label_mode=mode,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        label_chunk_tokens=options.chunk_tokens,
        num_positives=options.num_positives,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=options.bf16,
        **settings,
    )
    loss = losses.DecoupledSoftmaxLoss(options.temperature)
    return XMCTrainer(encoder, args, data.train, labels=data.labels, loss=loss)


def take_step(
    trainer: XMCTrainer, encoder: SentenceTransformer, batch: dict, seed: int, dropout: bool = False
) -> tuple[torch.Tensor, Work]:
    """Return the flat gradient of all parameters, and its cost."""
    work = {"tokens": 0.0, "embedded": 0.0}

    def add(tokens: int) -> None:
        work["tokens"] += tokens

    def count(module: torch.nn.Module, inputs: tuple, output: dict) -> None:
        tokens = inputs[0]["input_ids"].numel()
        add(tokens)
        if output["token_embeddings"].requires_grad:
            output["token_embeddings"].register_hook(lambda grad: add(2 * tokens))

    def select(*args: object) -> ScoredLabels:
        candidates = choose(*args)
        work["embedded"] = (len(candidates.label_ids) + getattr(trainer.negatives, "num_refreshed", 0)) / labels
        return candidates

    hook = encoder[0].register_forward_hook(count)
    labels, choose = len(trainer.labels), trainer.negatives.select
    trainer.negatives.select = select
    encoder.train(dropout)
    encoder.zero_grad()
    set_seed(seed)
    _synchronize()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    trainer.compute_loss(encoder, trainer._prepare_inputs(dict(batch))).backward()
    _synchronize()
    seconds = clock() - start
    hook.remove()
    trainer.negatives.select = choose
    gradient = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    return gradient, {"seconds": seconds, **work}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    options: argparse.Namespace, encoder: SentenceTransformer, data: XMCData, warm_steps: int, warm: XMCTrainer | None
) -> list[dict]:
    modes = {"exact": make_trainer(options, encoder, data, "exact")}
    for share in options.shares:
        if "fresh" in options.modes:
            modes[f"fresh {share:g}"] = make_trainer(options, encoder, data, "fresh", label_sample_fraction=share)
        if "bank" in options.modes:
            settings = {"label_sample_fraction": share, "label_bank_max_age": options.max_age}
            bank = modes[f"bank {share:g}"] = make_trainer(options, encoder, data, "bank", **settings)
            if warm is not None:
                bank.negatives.embeddings = warm.negatives.embeddings.clone()
    if options.num_random:
        random = {"num_hard_negatives": 0, "num_random_negatives": options.num_random}
        modes[f"mined, {options.num_random} random"] = make_trainer(options, encoder, data, "mined", **random)

    rows = []
    batches = iter(next(iter(modes.values())).get_train_dataloader())
    for number in range(options.batches):
        batch = next(batches)
        batch["row"] = torch.zeros(len(batch["label"]), dtype=torch.long)  # any row, because there is no shortlist
        exact, base = take_step(modes["exact"], encoder, batch, seed=0)
        rows.append({"mode": "exact", "batch": number, "seed": 0, **describe(exact, base, exact, base)})
        if options.dropout:
            one, other = (take_step(modes["exact"], encoder, batch, seed, dropout=True) for seed in (0, 1))
            rows.append({"mode": "exact, two dropout masks", "batch": number, "seed": 0, **describe(*other, *one)})
        for name, trainer in modes.items():
            for seed in range(options.seeds) if name != "exact" else ():
                if name.startswith("bank") and trainer.negatives.embeddings is None:
                    take_step(trainer, encoder, batch, seed)  # the first step fills the bank
                remembered = trainer.negatives.embeddings.clone() if name.startswith("bank") else None
                gradient, work = take_step(trainer, encoder, batch, seed)
                if remembered is not None:
                    trainer.negatives.embeddings = remembered  # every draw uses the same bank
                rows.append({"mode": name, "batch": number, "seed": seed, **describe(gradient, work, exact, base)})
        print(f"batch {number}: exact {base['seconds']:.1f} s", flush=True)
    return [{"warm_steps": warm_steps, **row} for row in rows]


def describe(gradient: torch.Tensor, work: Work, exact: torch.Tensor, base: Work) -> dict:
    return {
        "cosine": float(gradient.double() @ exact.double() / gradient.double().norm() / exact.double().norm()),
        "length": float(gradient.norm() / exact.norm()),
        "seconds": work["seconds"],
        "time": work["seconds"] / base["seconds"],
        "work": work["tokens"] / base["tokens"],
        "embedded": work["embedded"],
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--max_seq_length", type=int, default=32, help="maximum number of tokens per text")
    parser.add_argument("--num_labels", type=int, help="number of labels to draw; by default all")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="number of draws of each mode on each batch")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--modes", nargs="+", choices=["fresh", "bank"], default=["fresh", "bank"])
    parser.add_argument("--max_age", type=int, default=50)
    parser.add_argument(
        "--num_random",
        type=int,
        default=0,
        help="number of random labels in a `mined` step; 0 skips the mode",
    )
    parser.add_argument("--num_positives", type=int, help="number of positives to draw for a query; by default all")
    parser.add_argument("--chunk_tokens", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument(
        "--warm_steps", type=int, nargs="+", default=[0], help="numbers of training steps after which to measure"
    )
    parser.add_argument("--dropout", action="store_true", help="also compare exact steps under two dropout masks")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    data = subset(load_xmc(options.data), options.num_labels)
    encoder = SentenceTransformer(options.model)
    encoder.max_seq_length = options.max_seq_length
    print(f"{data.num_labels} labels, {len(data.train)} queries, batch {options.batch_size}", flush=True)
    rows, done, warm = [], 0, None
    for warm_steps in options.warm_steps:
        if warm_steps > done:
            settings = {"label_sample_fraction": 0.05, "label_bank_max_age": options.max_age}
            warm = make_trainer(options, encoder, data, "bank", max_steps=warm_steps - done, **settings)
            warm.train()
            done = warm_steps
        rows += measure(options, encoder, data, warm_steps, warm)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
            plot(rows, options.json.with_suffix(".png"))
    print(table(rows))


def table(rows: list[dict]) -> str:
    lines = ["| after steps | mode | cosine, mean (least) | length | labels embedded | time | work |", "|---" * 7 + "|"]
    for key in dict.fromkeys((row["warm_steps"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["warm_steps"], row["mode"]) == key]
        mean = {name: statistics.mean(row[name] for row in chosen) for name in MEANS}
        lines.append(
            f"| {key[0]} | {key[1]} | {mean['cosine']:.3f} ({min(row['cosine'] for row in chosen):.3f}) | "
            f"{mean['length']:.2f} | {mean['embedded']:.1%} | {mean['time']:.2f}x | {mean['work']:.2f}x |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw a mark for each step, by the accuracy of its gradient and its time."""
    from hf_xmc.experiment.plots import legend, panels, style

    with style():
        states = list(dict.fromkeys(row["warm_steps"] for row in rows))
        figure, axes = panels(len(states), sharex=True, sharey=True)
        for warm_steps, axis in zip(states, axes[:, 0], strict=True):
            for mode in dict.fromkeys(row["mode"] for row in rows):
                chosen = [row for row in rows if (row["warm_steps"], row["mode"]) == (warm_steps, mode)]
                axis.plot(
                    [row["time"] for row in chosen], [row["cosine"] for row in chosen], "o", alpha=0.6, label=mode
                )
            axis.set(title=f"after {warm_steps} steps of training", ylabel="cosine with the exact gradient")
        axes[-1, 0].set_xlabel("time of a step, exact = 1")
        axes[-1, 0].set_xlim(left=0)
        legend(figure)
        figure.savefig(path)


if __name__ == "__main__":
    main()
