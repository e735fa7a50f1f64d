"""Measure the indexes of many labels: time of one query, recall, memory by kind, and time to load.

    python recipes/benchmarks/index.py --model runs/demo/model --data recipes/data/wordnet-hypernyms \\
        --labels 1300000 --indexes exact SQ8 Int8 IVF1024,Int8 --json index.json

Labels are generated titles: a piece of a training text, and a piece of another one, of the same topic half of the time.
The model embeds them, and the texts of the test split are the queries. Each index is saved with its model. Separate
processes load it with `verify=False` and search one query at a time, on one thread. They take turns for `--rounds`
rounds, so that the times can be compared. Times of queries are CPU milliseconds of the search alone, without the
embedding of the query. Memory is that of the process, above one that holds the encoder alone: anonymous memory, and
pages of mapped files, which processes share and the system can take back. The effort of an index that does not score
all labels is tuned on other queries for a recall of 0.99. `Int8` has two rows, with all lists and tuned. A number after
a colon, as in `RaBitQfs:20`, is the number of candidates per requested label that are ranked. An index that no model
saves is built by its process, so its time to load includes building it, and its memory includes what building leaves.
The ratio is that of the medians of CPU time to the first index. `--embeddings titles.npy` keeps the embeddings of the
titles for further runs, and may hold those of another encoder, of as many titles.
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import numpy as np

from hf_xmc.cli import HelpFormatter

K = 10
GIB = 2**30
FORKS = get_context("forkserver")
VISITS = re.compile("IVF|HNSW|NSG|Int8")  # indexes that need not visit every label


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

    from hf_xmc import FaissIndex, LabelIndex, XMCModel, load_xmc
    from hf_xmc.hub.manifest import LAYOUT

    data = load_xmc(options.data)
    encoder = SentenceTransformer(options.model, device="cpu")
    if options.unit_norm:
        encoder.similarity_fn_name = "cosine"
    names = titles(data, options.labels)
    start = time.process_time()
    kept = options.embeddings if options.embeddings and options.embeddings.exists() else None
    model = XMCModel(encoder, names, None if kept is None else np.load(kept, mmap_mode="c"))
    print(f"embedding: {time.process_time() - start:.0f} CPU seconds", file=sys.stderr)
    if options.embeddings and kept is None:
        np.save(options.embeddings, model.index.embeddings.numpy())
    queries = model.embed(data.test["text"][: options.queries + options.tune])
    np.save(folder / "queries.npy", queries[: options.queries].numpy())
    exact = LabelIndex(model.index.embeddings).search(queries[: options.queries], K)
    np.save(folder / "label_ids.npy", exact.label_ids)
    XMCModel(encoder).save_pretrained(folder / "encoder")
    rows: list[dict] = []
    for number, name in enumerate(options.indexes):
        factory, _, refine = name.partition(":")
        about = {"index": name, "labels": options.labels, "dim": model.index.embedding_dim, "model": str(number)}
        start, visits = time.process_time(), VISITS.search(factory)
        if saved(factory) or visits:
            model.index = factory if factory == "exact" else FaissIndex(model.index.embeddings, factory)
            about["build_seconds"] = time.process_time() - start
        if refine and saved(factory):
            model.index.refine = int(refine)
        if not saved(factory):
            settings = {"factory": factory, "refine": int(refine or 4)}
            (folder / f"{number}.json").write_text(json.dumps(settings))
        else:
            model.save_pretrained(folder / str(number))
            if number:  # one file of embeddings serves all models
                path = folder / str(number) / LAYOUT.label_embeddings
                path.unlink()
                os.link(folder / "0" / LAYOUT.label_embeddings, path)
            files = (folder / str(number)).rglob("faiss*")
            about["file_gib"] = sum(path.stat().st_size for path in files) / GIB
        if not visits or model.index.scans:
            rows.append(about)
        if visits:
            start = time.process_time()
            about = {**about, "tuned_recall": model.index.tune(queries[options.queries :], recall=0.99, k=K)}
            rows.append({**about, "effort": model.index.effort, "tune_seconds": time.process_time() - start})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def saved(factory: str) -> bool:
    """Return whether a model saves the codes, graph or lists of an index, so that they are not computed again."""
    from hf_xmc.search.faiss_codes import INT8
    from hf_xmc.search.faiss_tables import FACTORY

    return factory == "exact" or any(
        pattern.fullmatch(factory) and VISITS.search(factory) for pattern in (INT8, FACTORY)
    )


def memory() -> dict[str, float]:
    text = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 2**20 for name in ("RssAnon", "RssFile")}


def measure(folder: Path, name: str, effort: int | None) -> dict:
    """Load a model and search one query at a time."""
    import faiss
    import torch

    from hf_xmc import FaissIndex, XMCModel

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    XMCModel.from_pretrained(folder / "encoder", device="cpu")  # imports everything
    start, cpu_start = time.perf_counter(), time.process_time()
    kept = folder / f"{name}.json"
    model = XMCModel.from_pretrained(folder / ("0" if kept.exists() else name), device="cpu", verify=False)
    if kept.exists():
        model.index = FaissIndex(model.index.embeddings, **json.loads(kept.read_text()))
    if name != "encoder" and effort is not None:
        model.index.effort = effort
    row = {"load_seconds": time.perf_counter() - start, "load_cpu": time.process_time() - cpu_start}
    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "label_ids.npy")
    if name == "encoder":
        return {**row, **memory()}
    return {**row, **searched(model.index, queries, exact), **memory()}


def searched(index, queries: np.ndarray, exact: np.ndarray) -> dict:
    """Search one query at a time. Return the times, and the recall of the label ids that exact search found."""
    found, cpu, wall = [], [], []
    for query in queries:
        start, cpu_start = time.perf_counter(), time.process_time()
        found.append(index.search(query[None], K).label_ids[0])
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - start)
    hits = [len(np.intersect1d(one, other)) / K for one, other in zip(found, exact, strict=True)]
    return {"recall": float(np.mean(hits)), "cpu": cpu, "wall": wall}


def search_only(options: argparse.Namespace) -> list[dict]:
    """Build and search each index in this process, with each kind of norms."""
    from sentence_transformers import SentenceTransformer

    from hf_xmc import FaissIndex, LabelIndex, load_xmc

    texts = list(load_xmc(options.data).test["text"][: options.queries + options.tune])
    queries = SentenceTransformer(options.model, device="cpu").encode(texts).astype(np.float32)
    rows = []
    for norms in options.norms:
        labels, searching = with_norms(np.load(options.embeddings, mmap_mode="r")[: options.labels], queries, norms)
        first, others = searching[: options.queries], searching[options.queries :]
        exact = LabelIndex(labels).search(first, K).label_ids
        for name in options.indexes:
            factory, _, refine = name.partition(":")
            start, efforts = time.process_time(), [None]
            index = LabelIndex(labels) if factory == "exact" else FaissIndex(labels, factory, refine=int(refine or 4))
            row = {"index": name, "labels": len(labels), "norms": norms, "build_seconds": time.process_time() - start}
            if VISITS.search(factory):
                before = index.effort if index.scans else None
                row["tuned_recall"] = index.tune(others, recall=0.99, k=K)
                efforts = [index.effort] if before is None else [before, index.effort]
            for effort in efforts:
                if effort is not None:
                    index.effort = effort
                turn = searched(index, first, exact)
                cpu = np.array(turn["cpu"]) * 1e3
                about = {"p50_cpu_ms": float(np.median(cpu)), "p95_cpu_ms": float(np.percentile(cpu, 95))}
                rows.append({**row, "effort": effort, "recall@10": turn["recall"], **about})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def with_norms(labels: np.ndarray, queries: np.ndarray, norms: str) -> tuple[np.ndarray, np.ndarray]:
    """Return label and query embeddings whose labels have free, unit or augmented norms.

    Augmented labels have one more dimension, which gives all of them the largest norm. The queries have a zero there,
    so the scores stay the same, and the nearest label is also the one with the best score.
    """
    if norms == "free":
        return labels.copy(), queries
    squares = np.einsum("nd,nd->n", labels, labels)[:, None]
    if norms == "unit":
        return labels / np.maximum(np.sqrt(squares), 1e-12), queries
    rest = np.sqrt(squares.max() - squares).astype(np.float32)
    return np.hstack([labels, rest]), np.hstack([queries, np.zeros((len(queries), 1), np.float32)])


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
    parser.add_argument("--search_only", action="store_true", help="save no model; needs `--embeddings`")
    parser.add_argument(
        "--norms",
        nargs="+",
        choices=["free", "unit", "augmented"],
        default=["free", "unit"],
        help="norms of the labels with `--search_only`; `augmented` makes free norms equal by one more dimension",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.search_only:
        rows = search_only(options)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        return
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = prepare(options, folder)
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        FORKS.set_forkserver_preload(["faiss", "hf_xmc.model.model", "hf_xmc.search.faiss_index"])
        alone = child(folder, "encoder")
        seen: list[list[dict]] = [[] for _ in rows]
        for _ in range(options.rounds):
            for row, turns in zip(rows, seen, strict=True):
                turns.append(child(folder, row["model"], row.get("effort")))
                about = {key: value for key, value in turns[-1].items() if key not in ("cpu", "wall")}
                p50 = 1e3 * float(np.median(turns[-1]["cpu"]))
                print(row["index"], row.get("effort"), f"p50 {p50:.2f} CPU ms", about, file=sys.stderr, flush=True)
        for row, turns in zip(rows, seen, strict=True):
            cpu, wall = (np.concatenate([turn[key] for turn in turns]) * 1e3 for key in ("cpu", "wall"))
            row |= {"p50_cpu_ms": np.median(cpu), "p95_cpu_ms": np.percentile(cpu, 95), "p50_ms": np.median(wall)}
            row |= {key: float(np.median([turn[key] for turn in turns])) for key in ("load_seconds", "load_cpu")}
            row |= {key: max(turn[key] for turn in turns) - alone[key] for key in ("RssAnon", "RssFile")}
            row |= {"recall@10": turns[0]["recall"], "ratio": row["p50_cpu_ms"] / rows[0]["p50_cpu_ms"]}
        for number in range(len(options.indexes)):
            rmtree(folder / str(number), ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def child(folder: Path, name: str, effort: int | None = None) -> dict:
    """Measure in a process that shares only the imports."""
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        return pool.submit(measure, folder, name, effort).result()


def table(rows: list[dict]) -> str:
    head = [
        "labels",
        "index",
        "lists visited",
        "recall@10",
        "p50 CPU ms",
        "p95",
        "ratio",
        "anonymous GiB",
        "mapped GiB",
    ]
    head += ["load s", "load CPU s", "file GiB", "build CPU s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row['labels']:,}", f"`{row['index']}`", str(row.get("effort", "all")), f"{row['recall@10']:.4f}"]
        keys = ("p50_cpu_ms", "p95_cpu_ms", "ratio", "RssAnon", "RssFile", "load_seconds", "load_cpu")
        cells += [f"{row[key]:.3f}" if key == "ratio" else f"{row[key]:.2f}" for key in keys]
        cells += [f"{row.get('file_gib', 0):.2f}", f"{row.get('build_seconds', row['load_cpu']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
