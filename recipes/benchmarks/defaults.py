"""Measure ``XMCTrainer`` with no further settings: P@1 before and after, for a static encoder or a transformer.

The texts are a sample of WordNet definitions whose labels are among the most frequent ones:

    python recipes/benchmarks/defaults.py static
    python recipes/benchmarks/defaults.py sentence-transformers/all-MiniLM-L6-v2 --num_texts 600 --num_labels 100 \
        --skip_labels 100 --num_test 300 --names --max_seq_length 16 --bf16

``--stock`` uses the values of transformers instead: batches of 8, a learning rate of 5e-5 and 3 epochs. Values are
chosen by ``validation``, whose texts come from the training split.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCData, XMCEvaluator, XMCTrainer, XMCTrainingArguments, load_xmc, static_encoder
from hf_xmc.cli import HelpFormatter

STOCK = {"per_device_train_batch_size": 8, "learning_rate": 5e-5, "num_train_epochs": 3}
METRICS = ("P@1", "P@5", "nDCG@5")


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Train, print the result as JSON, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("encoder", help="`static`, or a sentence-transformers model")
    parser.add_argument("--data", default="recipes/data/wordnet-hypernyms")
    parser.add_argument("--num_texts", type=int, default=2000, help="number of training texts")
    parser.add_argument("--num_labels", type=int, default=300, help="number of labels, the most frequent ones")
    parser.add_argument(
        "--skip_labels", type=int, default=0, help="number of labels to leave out that are more frequent"
    )
    parser.add_argument("--names", action="store_true", help="label texts are a single name without its definition")
    parser.add_argument("--num_test", type=int, default=1000, help="number of texts of each split to measure on")
    parser.add_argument("--max_seq_length", type=int, help="maximum length of a text in tokens, of a transformer")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--stock", action="store_true", help="use the values of transformers")
    parser.add_argument("--learning_rate", type=float, help="learning rate in place of the default")
    parser.add_argument("--num_train_epochs", type=float, help="number of epochs in place of the default")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_xmc").setLevel(logging.INFO)

    data = sample(load_xmc(options.data), options)
    if options.encoder == "static":
        encoder = static_encoder([*data.train["text"][:], *data.labels["text"][:]], device="cpu")
    else:
        encoder = SentenceTransformer(options.encoder, device="cpu")
        encoder.max_seq_length = options.max_seq_length or encoder.max_seq_length
    given = {name: value for name in STOCK if (value := getattr(options, name, None)) is not None}
    given = STOCK if options.stock else given
    evaluators = {split: XMCEvaluator.from_data(data, split) for split in ("validation", "test")}
    before, start = measure(encoder, evaluators), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        args = XMCTrainingArguments(folder, **quiet, bf16=options.bf16, **given)
        trainer = XMCTrainer(encoder, args, data.train, labels=data.labels)
        steps = trainer.train().global_step
    seconds = time.process_time() - start
    result = {
        "encoder": options.encoder,
        "arguments": {name: getattr(trainer.args, name) for name in STOCK},
        "steps": steps,
        "texts": len(data.train),
        "labels": data.num_labels,
        "before": before,
        "after": measure(encoder, evaluators),
        "cpu_seconds": round(seconds),
    }
    print(json.dumps(result))
    return result


def measure(encoder: SentenceTransformer, evaluators: dict[str, XMCEvaluator]) -> dict[str, dict[str, float]]:
    """Return the metrics of each split in percent."""
    results = {split: evaluator(encoder) for split, evaluator in evaluators.items()}
    return {split: {name: round(100 * found[name], 1) for name in METRICS} for split, found in results.items()}


def sample(data: XMCData, options: argparse.Namespace) -> XMCData:
    """Return data with frequent labels, and texts drawn at random among those that have one of them."""
    first, last = options.skip_labels, options.skip_labels + options.num_labels
    frequent = np.sort(np.argsort(-data.label_counts(), kind="stable")[first:last])
    names = [re.split("[:,]", name)[0] if options.names else name for name in data.labels["text"]]

    def draw(split: str, first: int, number: int) -> tuple[list[str], list[list[str]]]:
        relevance = data.relevance(split)[:, frequent]
        rows = np.random.default_rng(0).permutation(np.flatnonzero(np.diff(relevance.indptr)))[first : first + number]
        texts = data.split(split).select(rows)["text"][:]
        return texts, [[str(frequent[label]) for label in relevance[[row]].indices] for row in rows]

    vocabulary = {str(label): names[int(label)] for label in frequent}
    number = options.num_test
    splits = {"validation": draw("train", options.num_texts, number), "test": draw("test", 0, number)}
    return XMCData.from_lists(*draw("train", 0, options.num_texts), vocabulary, **splits)


if __name__ == "__main__":
    main()
