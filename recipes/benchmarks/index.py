"""Measure the indexes of many labels: time of one query, recall, memory by kind, and time to load.

    python recipes/benchmarks/index.py --model runs/demo/model --data recipes/data/wordnet-hypernyms \\
        --labels 1300000 --indexes exact SQ8 Int8 IVF1024,Int8 --json index.json

Labels are generated titles: a piece of a training text, and a piece of another one, of the same topic half of the time.
The model embeds them, and the texts of the test split are the queries. Each index is saved with its model. Separate
processes load it with `verify=False` and search one query at a time, on one thread. They take turns for `--rounds`
rounds, so that the times can be compared. Times of queries are CPU milliseconds of the search alone, without the
embedding of the query. Memory is that of the process, above one that holds the encoder alone: anonymous memory, and
pages of mapped files, which processes share and the system can take back. The effort of an index that does not score
all labels is tuned on other queries for a recall of 0.99. `--embeddings titles.npy` keeps the embeddings of the titles
for further runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import numpy as np

from hf_xmc.cli import HelpFormatter

K = 10
GIB = 2**30


def titles(data, number: int, seed: int = 0) -> list[str]:
    """Return different titles, each made of two pieces of training texts."""
    rng = np.random.default_rng(seed)
    pieces = [
        (piece.strip(' "'), max(label_ids))
        for text, label_ids in zip(data.train["text"], data.train["label_ids"], strict=True)
        for piece in re.split(r"[:;,]", text)
        if len(piece.split()) > 1
    ]
    topic = np.array([label for _, label in pieces])  # the most specific label of the text
    by_topic, sizes = np.argsort(topic, kind="stable"), np.bincount(topic)
    start = (sizes.cumsum() - sizes)[topic]
    found: dict[str, None] = {}
    while len(found) < number:
        first = rng.integers(0, len(pieces), number)
        same = by_topic[start[first] + (rng.random(number) * sizes[topic[first]]).astype(int)]
        second = np.where(rng.random(number) < 0.5, same, rng.integers(0, len(pieces), number))
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            if one != other:
                found[f"{pieces[one][0]}, {pieces[other][0]}"] = None
    return list(found)[:number]


def prepare(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Save a model with each index, and return what is known of them."""
    from sentence_transformers import SentenceTransformer

    from hf_xmc import LabelIndex, XMCModel, load_xmc

    data = load_xmc(options.data)
    encoder = SentenceTransformer(options.model, device="cpu")
    if options.unit_norm:
        encoder.similarity_fn_name = "cosine"
    names = titles(data, options.labels)
    start = time.process_time()
    kept = options.embeddings if options.embeddings and options.embeddings.exists() else None
    model = XMCModel(encoder, names, None if kept is None else np.load(kept))
    print(f"embedding: {time.process_time() - start:.0f} CPU seconds", file=sys.stderr)
    if options.embeddings and kept is None:
        np.save(options.embeddings, model.index.embeddings.numpy())
    queries = model.embed(data.test["text"][: options.queries + options.tune])
    np.save(folder / "queries.npy", queries[: options.queries].numpy())
    exact = LabelIndex(model.index.embeddings).search(queries[: options.queries], K)
    np.save(folder / "label_ids.npy", exact.label_ids)
    XMCModel(encoder).save_pretrained(folder / "encoder")
    rows = []
    for number, name in enumerate(options.indexes):
        start, row = time.process_time(), {"index": name, "labels": options.labels, "dim": model.index.embedding_dim}
        model.index = name
        if name != "exact" and not model.index.scans:
            model.index.tune(queries[options.queries :], recall=0.99, k=K)
            row["effort"] = model.index.effort
        row["build_seconds"] = time.process_time() - start
        model.save_pretrained(folder / str(number))
        row["file_gib"] = sum(path.stat().st_size for path in (folder / str(number)).rglob("faiss*")) / GIB
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def memory() -> dict[str, float]:
    text = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 2**20 for name in ("RssAnon", "RssFile")}


def measure(options: argparse.Namespace, folder: Path, name: str) -> dict:
    """Load a model and search one query at a time."""
    import faiss
    import torch

    from hf_xmc import XMCModel

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    XMCModel.from_pretrained(folder / "encoder", device="cpu")  # imports everything
    start, cpu_start = time.perf_counter(), time.process_time()
    model = XMCModel.from_pretrained(folder / name, device="cpu", verify=False)
    row = {"load_seconds": time.perf_counter() - start, "load_cpu": time.process_time() - cpu_start}
    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "label_ids.npy")
    if name == "encoder":
        return {**row, **memory()}
    found, cpu, wall = [], [], []
    for query in queries:
        start, cpu_start = time.perf_counter(), time.process_time()
        found.append(model.index.search(query[None], K).label_ids[0])
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - start)
    hits = [len(np.intersect1d(one, other)) / K for one, other in zip(found, exact, strict=True)]
    return {**row, **memory(), "recall": float(np.mean(hits)), "cpu": cpu, "wall": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="encoder or saved model: a folder or a name on the Hub")
    parser.add_argument("--data", required=True, help="data set of texts")
    parser.add_argument("--labels", type=int, default=1_300_000)
    parser.add_argument("--indexes", nargs="+", default=["exact", "SQ8", "Int8", "IVF1024,Int8"])
    parser.add_argument("--unit_norm", action="store_true", help="compare by the cosine")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--tune", type=int, default=500, help="number of other queries to tune on")
    parser.add_argument("--embeddings", type=Path, help="file of the embeddings of the titles; written if missing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save the models; by default a temporary folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.folder, options.one)))
        return
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = prepare(options, folder)
        alone = child(folder, "encoder")
        seen: list[list[dict]] = [[] for _ in rows]
        for _ in range(options.rounds):
            for number in range(len(rows)):
                seen[number].append(child(folder, str(number)))
        for row, turns in zip(rows, seen, strict=True):
            cpu, wall = (np.concatenate([turn[key] for turn in turns]) * 1e3 for key in ("cpu", "wall"))
            row |= {"p50_cpu_ms": np.median(cpu), "p95_cpu_ms": np.percentile(cpu, 95), "p50_ms": np.median(wall)}
            row |= {key: float(np.median([turn[key] for turn in turns])) for key in ("load_seconds", "load_cpu")}
            row |= {key: max(turn[key] for turn in turns) - alone[key] for key in ("RssAnon", "RssFile")}
            row |= {"recall@10": turns[0]["recall"]}
        for number in range(len(rows)):
            rmtree(folder / str(number))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def child(folder: Path, name: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *sys.argv, "--one", name, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    head = ["labels", "index", "lists visited", "recall@10", "p50 CPU ms", "p95", "anonymous GiB", "mapped GiB"]
    head += ["load s", "load CPU s", "file GiB", "build CPU s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row['labels']:,}", f"`{row['index']}`", str(row.get("effort", "all")), f"{row['recall@10']:.4f}"]
        cells += [f"{row[key]:.2f}" for key in ("p50_cpu_ms", "p95_cpu_ms", "RssAnon", "RssFile", "load_seconds")]
        cells += [f"{row[key]:.2f}" for key in ("load_cpu", "file_gib")] + [f"{row['build_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
