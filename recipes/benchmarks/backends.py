"""Measure other backends of an encoder: the change of its scores, P@5, and the CPU time of 1,000 texts.

    python recipes/benchmarks/backends.py --model minilm --data recipes/data/wordnet-hypernyms \\
        --settings '{"backend": "openvino", "model_kwargs": {"file_name": "openvino_model_int8.xml"}}'

Each of `--settings` holds arguments of `XMCModel.from_pretrained`. The labels have their saved embeddings, by torch; a
backend embeds the texts alone, as it does when a model is served. `--make` saves a model of an encoder first.
"""

import argparse
import json
import resource
from pathlib import Path

import numpy as np

from hf_xmc.cli import HelpFormatter


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def make(folder: Path, encoder: str, options: argparse.Namespace) -> None:
    """Save an untrained model of the first labels of the data."""
    from hf_xmc import XMCModel, load_xmc

    labels = load_xmc(options.data).labels.select(range(options.num_labels))
    XMCModel.from_pretrained(encoder, labels=labels, device="cpu").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model")
    parser.add_argument("--make", metavar="ENCODER", help="encoder to make the model of, if the folder is missing")
    parser.add_argument("--data", required=True, help="data set; its test texts with one of the labels are used")
    parser.add_argument("--num_labels", type=int, default=2000, help="number of labels of a new model")
    parser.add_argument("--num_texts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="times each setting embeds the texts; the fastest counts")
    parser.add_argument("--settings", nargs="*", default=[], help="arguments for each loading, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of PyTorch")
    options = parser.parse_args()

    import torch

    from hf_xmc import XMCModel, load_xmc
    from hf_xmc.encoders.encode import encode_queries

    torch.set_num_threads(options.threads)
    if options.make and not options.model.exists():
        make(options.model, options.make, options)
    data, base = load_xmc(options.data), None
    for settings in [{}, *map(json.loads, options.settings)]:
        model = XMCModel.from_pretrained(options.model, device="cpu", **settings)
        relevance = data.relevance("test")[:, : len(model.labels)]
        rows = np.flatnonzero(relevance.sum(1))[: options.num_texts]
        texts, relevance = [data.test["text"][int(row)] for row in rows], relevance[rows].toarray() > 0
        encode_queries(model.encoder, texts[:32], 32)  # the first call compiles
        times = []
        for _ in range(options.rounds):
            start = cpu_seconds()
            queries = encode_queries(model.encoder, texts, 32)
            times.append(1000 * (cpu_seconds() - start) / len(texts))
        scores = queries.float() @ model.index.embeddings.float().T
        best = scores.topk(5, dim=1).indices.numpy()
        base = scores if base is None else base
        result = {"texts": len(texts), "labels": scores.shape[1], "cpu_seconds_per_1000_texts": round(min(times), 2)}
        result["P@5"] = round(float(np.take_along_axis(relevance, best, 1).mean()), 4)
        result["max_difference"] = float(f"{(scores - base).abs().max():.2g}")
        same = [
            len(set(ours) & set(theirs)) for ours, theirs in zip(best, base.topk(5, dim=1).indices.numpy(), strict=True)
        ]
        result["same_top_5"] = round(float(np.mean(same)) / 5, 4)
        print(json.dumps({"settings": settings, **result}), flush=True)


if __name__ == "__main__":
    main()
