"""Compare our in-batch losses with those of sentence-transformers, on the same rows in the same order.

    python recipes/benchmarks/in_batch.py --data recipes/data/wordnet-hypernyms --json in_batch.json
    python recipes/benchmarks/in_batch.py --data ... --model sentence-transformers/all-MiniLM-L6-v2 --batch_size 64 \
        --steps 30 --learning_rate 1e-4 --max_queries 2000 --json in_batch_minilm.json

Every row is a query and one of its labels, drawn before training, so that all losses see the same pairs. Our losses
also get all labels of the query. `--overhead` measures milliseconds per step and peak memory instead, with each loss in
a separate process, in turns and repeatedly.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from transformers import set_seed

from hf_xmc import (
    XMCData,
    XMCEvaluator,
    in_batch_dataset,
    load_xmc,
    st_losses,
    static_encoder,
)
from hf_xmc.cli import HelpFormatter

METRICS = ("P@1", "P@5", "PSP@5", "R@100")
SIMILARITIES = {"cosine": cos_sim, "dot": dot_score}


def make_losses(mini_batch_size: int, temperature: float, similarity: str) -> dict:
    theirs = {"scale": 1 / temperature, "similarity_fct": SIMILARITIES[similarity]}
    ours = {"temperature": temperature, "similarity_fct": SIMILARITIES[similarity]}
    cached = {"mini_batch_size": mini_batch_size}
    ranking, cached_ranking = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    return {
        "MultipleNegativesRankingLoss": lambda m: ranking(m, **theirs),
        "MultipleNegativesRankingLoss, no duplicates": lambda m: ranking(m, **theirs),
        "CachedMultipleNegativesRankingLoss": lambda m: cached_ranking(m, **theirs, **cached),
        "DecoupledSoftmaxLoss": lambda m: st_losses.DecoupledSoftmaxLoss(m, **ours),
        "DecoupledSoftmaxLoss, cached": lambda m: st_losses.DecoupledSoftmaxLoss(m, **ours, **cached),
        "SoftmaxLoss": lambda m: st_losses.SoftmaxLoss(m, **ours),
        "SoftTopKLoss": lambda m: st_losses.SoftTopKLoss(m, **ours),
    }


def draw_rows(data: XMCData, number: int, seed: int) -> Dataset:
    """Draw queries in random order, repeated until there are enough, each with one of its labels."""
    set_seed(seed)
    pairs = in_batch_dataset(data.train, data.labels)
    order = torch.cat([torch.randperm(len(pairs)) for _ in range(-(-number // len(pairs)))])[:number]
    return Dataset.from_dict(pairs[order.tolist()])


def make_encoder(options: argparse.Namespace, data: XMCData, seed: int) -> SentenceTransformer:
    if options.model == "static":
        return static_encoder([*data.train["text"][:], *data.labels["text"][:]], embedding_dim=256, seed=seed)
    encoder = SentenceTransformer(options.model)
    encoder.max_seq_length = options.max_seq_length
    return encoder


def run(options: argparse.Namespace, data: XMCData, name: str, seed: int) -> dict[str, float]:
    rows = draw_rows(data, options.steps * options.batch_size, seed)
    encoder = make_encoder(options, data, seed)
    loss = make_losses(options.mini_batch_size, options.temperature, options.similarity)[name](encoder)
    args = SentenceTransformerTrainingArguments(
        "runs/in_batch",
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=0.1,
        batch_sampler="no_duplicates" if "no duplicates" in name else "batch_sampler",
        save_strategy="no",
        seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    if name.startswith(("Multiple", "Cached")):
        rows = rows.remove_columns(
            "label"
        )  # their losses take no label, and the sampler would look for duplicates in it
    start = time.perf_counter()
    SentenceTransformerTrainer(encoder, args, rows, loss=loss).train()
    seconds = time.perf_counter() - start
    encoder.similarity_fn_name = options.similarity
    found = XMCEvaluator.from_data(first_queries(data, options.split, options.max_queries), options.split)(encoder)
    return {**{metric: 100 * found[metric] for metric in METRICS}, "train_seconds": seconds}


def first_queries(data: XMCData, split: str, number: int | None) -> XMCData:
    if number is None:
        return data
    rows = data.split(split).select(range(min(number, len(data.split(split)))))
    pairs = {name: p[p[:, 0] < len(rows)] if name == split else p for name, p in data.filter_pairs.items()}
    return replace(data, filter_pairs=pairs, **{split: rows})


def measure(options: argparse.Namespace, data: XMCData, name: str) -> dict[str, float]:
    """Return the median milliseconds of a step, and the MiB that the steps added to the peak of the process."""
    torch.set_num_threads(options.threads)
    rows = draw_rows(data, options.batch_size, seed=0)
    encoder = make_encoder(options, data, seed=0)
    loss = make_losses(options.mini_batch_size, options.temperature, options.similarity)[name](encoder)
    features = [encoder.preprocess(rows[column]) for column in ("anchor", "positive")]
    label = torch.tensor(rows["label"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        loss([dict(column) for column in features], label).backward()
        seconds.append(time.perf_counter() - start)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"milliseconds": 1000 * statistics.median(seconds), "MiB": added}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="static", help="`static`, or a sentence-transformers model")
    parser.add_argument("--losses", nargs="*", help="names of losses; by default all that the model supports")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--mini_batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=0.03)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--similarity", choices=SIMILARITIES, default="cosine")
    parser.add_argument(
        "--max_seq_length", type=int, default=32, help="maximum number of tokens per text for a transformer"
    )
    parser.add_argument("--max_queries", type=int, help="number of queries of the split to measure on, from the first")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", help=argparse.SUPPRESS)  # loss that a child process measures
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_xmc(options.data)
    data = data if data.validation else data.carve_validation(0.02)
    if options.one:
        print(json.dumps(measure(options, data, options.one)))
        return
    names = options.losses or list(make_losses(1, 1, "cosine"))
    if options.model == "static":  # no gradient caching without activations
        names = [name for name in names if "ached" not in name]

    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in options.seeds:
        for name in names:
            if options.overhead:
                command = [sys.executable, *sys.argv, "--one", name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                results[name].append(run(options, data, name, seed))
            print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    print(table(results, ratios=options.overhead))
    if options.json:
        about = {"machine": platform.processor(), "threads": options.threads, "torch": torch.__version__}
        report = {"options": vars(options), **about, "results": results}
        options.json.write_text(json.dumps(report, indent=2, default=str))


def table(results: dict[str, list[dict[str, float]]], ratios: bool) -> str:
    """Return mean and standard deviation over the seeds as Markdown, with the ratio to the first loss."""
    columns = list(next(iter(results.values()))[0])
    lines = [f"| loss | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = [one[column] for one in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            first = statistics.mean(one[column] for one in next(iter(results.values())))
            ratio = f" ({statistics.mean(values) / first:.2f}x)" if ratios else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}{ratio}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
