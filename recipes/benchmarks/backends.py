"""Measure other backends of an encoder: the change of its scores, P@1, P@5, and the CPU time of 1,000 texts.

    python recipes/benchmarks/backends.py --model minilm --data recipes/data/wordnet-hypernyms \\
        --settings '{"backend": "openvino", "model_kwargs": {"file_name": "openvino_model_int8.xml"}}'

Each of `--settings` holds arguments of `XMCModel.from_pretrained`. The labels have their saved embeddings, by torch; a
backend embeds the texts alone, as it does when a model is served. `--make` saves a model of an encoder first, and
`recipes/serving/export_backends.py` adds the files. `ratio` is the median over the rounds of the CPU time divided by
that of torch in the same round. ONNX Runtime takes as many threads as it has cores: `taskset -c 0` gives it one.
"""

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np

from hf_xmc.cli import HelpFormatter


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def make(folder: Path, encoder: str, options: argparse.Namespace) -> None:
    """Save an untrained model of the first labels of the data."""
    from hf_xmc import XMCModel, load_xmc

    labels = load_xmc(options.data).labels
    labels = labels.select(range(min(options.num_labels, len(labels))))
    XMCModel.from_pretrained(encoder, labels=labels, device="cpu").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model")
    parser.add_argument("--make", metavar="ENCODER", help="encoder to make the model of, if the folder is missing")
    parser.add_argument("--data", required=True, help="data set; its test texts with one of the labels are used")
    parser.add_argument("--num_labels", type=int, default=2000, help="number of labels of a new model, or all")
    parser.add_argument("--num_texts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="times each setting embeds the texts")
    parser.add_argument("--settings", nargs="*", default=[], help="arguments for each loading, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of PyTorch")
    options = parser.parse_args()

    import torch

    from hf_xmc import XMCModel, load_xmc
    from hf_xmc.encoders.encode import encode_queries

    torch.set_num_threads(options.threads)
    if options.make and not options.model.exists():
        make(options.model, options.make, options)
    data, settings = load_xmc(options.data), [{}, *map(json.loads, options.settings)]
    models = [XMCModel.from_pretrained(options.model, device="cpu", **each) for each in settings]
    relevance = data.relevance("test")[:, : len(models[0].labels)]
    rows = np.flatnonzero(relevance.sum(1))[: options.num_texts]
    texts, relevance = [data.test["text"][int(row)] for row in rows], relevance[rows].toarray() > 0
    for model in models:
        encode_queries(model.encoder, texts[:32], 32)  # the first call compiles
    times, scores = np.zeros((options.rounds, len(models))), [torch.empty(0)] * len(models)
    for one_round in times:  # each setting runs in each round, so that other work on the machine slows them alike
        for column, model in enumerate(models):
            start = cpu_seconds()
            queries = encode_queries(model.encoder, texts, 32)
            one_round[column] = 1000 * (cpu_seconds() - start) / len(texts)
            scores[column] = queries.float() @ model.index.embeddings.float().T
    ratios = np.median(times / times[:, :1], axis=0)
    for each, seconds, ratio, found in zip(settings, times.min(0), ratios, scores, strict=True):
        result = {"texts": len(texts), "labels": found.shape[1], "cpu_seconds_per_1000_texts": round(float(seconds), 2)}
        result = {**result, "ratio": round(float(ratio), 2), **quality(found, scores[0], relevance)}
        print(json.dumps({"settings": each, **result}), flush=True)


def quality(scores: Any, base: Any, relevance: np.ndarray) -> dict[str, float]:
    """Return precisions of scores, their differences from those of torch, and the share of labels in both top 5."""
    best, expected = scores.topk(5, dim=1).indices.numpy(), base.topk(5, dim=1).indices.numpy()
    hits, change = np.take_along_axis(relevance, best, 1), (scores - base).abs()
    same = np.mean([len(set(ours) & set(theirs)) for ours, theirs in zip(best, expected, strict=True)])
    return {
        "P@1": round(float(hits[:, 0].mean()), 4),
        "P@5": round(float(hits.mean()), 4),
        "max_difference": float(f"{change.max():.2g}"),
        "mean_difference": float(f"{change.mean():.2g}"),
        "same_top_5": round(float(same) / 5, 4),
    }


if __name__ == "__main__":
    main()
