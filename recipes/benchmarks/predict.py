"""Measure queries per second, and p50 and p95 of one query: exact search, FAISS, Milvus, and tree methods.

    python recipes/benchmarks/predict.py --model runs/demo/model --data recipes/data/wordnet-hypernyms \\
        --labels 0 131072 1305265 --threads 1 --peers_python peers/bin/python --json predict.json

0 stands for the labels of the model. More labels are generated: each additional embedding is the mean of those of two
halves of training texts. That equals the embedding of both in one text, except for the pair of words where they meet
and the leading words of the second half.
The systems take turns in each round, with a separate process for every number of labels and threads.
`predict_peers.py` lists the requirements of the peers' interpreter.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from hf_xmc.cli import HelpFormatter

VARIANTS = ("exact", "SQ8", "HNSW32", "IVF", "milvus", "memory, exact", "memory, HNSW32", "memory, fast")


class Ours:
    """The model with an index, with or without a memory."""

    def __init__(self, model, index, memory, **about) -> None:
        self.model, self.index, self.memory, self.about = model, index, memory, about

    def _use(self):
        self.model.index, self.model.memory = self.index, self.memory
        return self.model

    def found(self, texts: list[str], top_k: int, pairs: np.ndarray) -> np.ndarray:
        return self._use().search(texts, top_k, exclude=pairs).label_ids

    def one_by_one(self, texts: list[str]) -> list[tuple[float, float]]:
        model = self._use()
        return [timed(lambda text=text: model.predict(text)) for text in texts]

    def batch(self, texts: list[str]) -> tuple[float, float]:
        model = self._use()
        return timed(lambda: model.predict(texts))


class Peer:
    """A tree method in a process with another interpreter."""

    def __init__(self, process: subprocess.Popen, name: str) -> None:
        self.process, self.name, self.about = process, name, {}

    def _ask(self, texts: list[str], top_k: int, one_by_one: bool = False) -> dict:
        asked = {"peer": self.name, "texts": texts, "top_k": top_k, "one_by_one": one_by_one}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def found(self, texts: list[str], top_k: int, pairs: np.ndarray) -> np.ndarray:
        excluded = set(map(tuple, pairs.tolist()))
        answer = self._ask(texts, top_k + int(np.bincount(pairs[:, 0]).max()))["label_ids"]
        kept = [[label for label in ids if (row, label) not in excluded][:top_k] for row, ids in enumerate(answer)]
        return np.array([ids + [-1] * (top_k - len(ids)) for ids in kept])

    def one_by_one(self, texts: list[str]) -> list[tuple[float, float]]:
        answer = self._ask(texts, 5, one_by_one=True)
        return list(zip(answer["seconds"], answer["cpu_seconds"], strict=True))

    def batch(self, texts: list[str]) -> tuple[float, float]:
        answer = self._ask(texts, 5)
        return answer["seconds"][0], answer["cpu_seconds"][0]


def peers(options: argparse.Namespace, data, threads: int) -> dict[str, Peer]:
    folder = options.peers_folder
    folder.mkdir(parents=True, exist_ok=True)
    train = {"texts": data.train["text"][:], "label_ids": [list(map(int, ids)) for ids in data.train["label_ids"]]}
    (folder / "texts.json").write_text(json.dumps(train))
    script = str(Path(__file__).with_name("predict_peers.py"))
    command = [options.peers_python, script, str(folder), "--threads", str(threads)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
    return {name: Peer(process, name) for name in json.loads(process.stdout.readline())["ready"]}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu_start


def generated(model, texts: list[str], num_labels: int) -> np.ndarray:
    halves = [half for text in texts for half in (text[: len(text) // 2], text[len(text) // 2 :])]
    known = model.embed([half for half in halves if half.strip()]).numpy()
    pairs = np.random.default_rng(0).integers(0, len(known), (num_labels - len(model.labels), 2))
    made = [known[part[:, 0]] / 2 + known[part[:, 1]] / 2 for part in np.array_split(pairs, 1 + len(pairs) // 65536)]
    return np.concatenate([model.index.embeddings.numpy(), *made])


def ours(options: argparse.Namespace, model, tune_texts: list[str], folder: str) -> dict[str, Ours]:
    from hf_xmc import FaissIndex, LabelIndex, MilvusIndex, TrainingMemory

    embeddings, held, queries, systems = model.index.embeddings, model.memory, model.embed(tune_texts), {}

    def tuned(embeddings, factory: str, queries) -> FaissIndex:
        index = FaissIndex(embeddings, factory)
        if not index.scans:
            index.tune(queries, recall=0.99)
        return index

    for name in options.variants:
        start = time.perf_counter()
        index, memory = LabelIndex(embeddings), None
        if name.startswith("memory"):
            if held is None:
                continue
            memory = TrainingMemory(held.index.embeddings, held.relevance, settings=held.settings)
            if name == "memory, fast":  # fewer labels, both searches approximate, no extra candidates
                index = FaissIndex(embeddings, "HNSW16", effort=32, refine=1)
                memory.index = FaissIndex(held.index.embeddings, "IVF512,SQ8", effort=16, refine=1)
                memory.settings = replace(held.settings, candidates=32)
            elif name != "memory, exact":
                halves = model.embed([text[: len(text) // 2] for text in tune_texts])  # the memory has full texts
                unit = halves / halves.norm(dim=1, keepdim=True)
                memory.index = tuned(held.index.embeddings, name.split()[-1], unit)
        elif name == "milvus":
            index = MilvusIndex(embeddings, f"{folder}/labels.db", index_type="HNSW", search_params={"ef": 128})
        elif name != "exact":
            ivf = f"IVF{2 ** round(np.log2(4 * len(embeddings) ** 0.5))},SQ8"
            index = tuned(embeddings, ivf if name == "IVF" else name, queries)
        about = {"effort": getattr(memory.index if memory else index, "effort", None)}
        about["build_seconds"] = time.perf_counter() - start
        systems[name] = Ours(model, index, memory, **about)
        print(f"{name}: {about}", file=sys.stderr, flush=True)
    return systems


def measure(options: argparse.Namespace, num_labels: int, threads: int) -> list[dict]:
    import faiss
    import torch
    from datasets import Dataset

    from hf_xmc import LabelIndex, XMCEvaluator, XMCModel, load_xmc
    from hf_xmc.metrics.ranking import evaluate_ranking
    from hf_xmc.topk import recall_of

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    data, model = load_xmc(options.data), XMCModel.from_pretrained(options.model, device="cpu")
    train = data.train["text"][:]
    if num_labels:
        embeddings = generated(model, train, num_labels)
        names = Dataset.from_dict({"text": [f"label {row}" for row in range(num_labels)]})
        model = XMCModel(model.encoder, names, torch.from_numpy(embeddings))
    match_predictions = XMCEvaluator.from_data(data, "test")
    texts, relevance = match_predictions.texts[: options.queries], match_predictions.relevance[: options.queries]
    pairs = match_predictions.filter_pairs[match_predictions.filter_pairs[:, 0] < len(texts)]
    queries = model.embed(texts)
    exact = LabelIndex(model.index.embeddings).search(queries, 10)

    with TemporaryDirectory() as folder:
        held_out = data.carve_validation(0.02).validation  # what recipes/train.py does not train on
        systems = ours(options, model, held_out["text"][:500], folder)
        if options.peers_python and not num_labels:
            systems |= peers(options, data, threads)
        rows = {name: {"system": name, "labels": len(model.labels), "threads": threads} for name in systems}
        for name, system in systems.items():
            rows[name] |= system.about
            if isinstance(system, Ours) and system.memory is None:
                rows[name]["recall@10"] = recall_of(system.index.search(queries, 10), exact)
            if not num_labels:
                found = system.found(texts, 5, pairs)
                rows[name]["P@5"] = evaluate_ranking(found, relevance, ndcg_at=[5], recall_at=[5])["P@5"]
        single, batch = ({name: [] for name in systems} for _ in range(2))
        for turn in range(options.rounds):
            here = [texts[(turn * options.single + number) % len(texts)] for number in range(options.single)]
            for name, system in systems.items():
                single[name] += system.one_by_one(here)
                batch[name].append(system.batch(texts))
    for name, row in rows.items():
        wall, cpu = np.array(single[name]).T * 1e3
        row |= {"p50_ms": np.median(wall), "p95_ms": np.percentile(wall, 95), "p50_cpu_ms": np.median(cpu)}
        wall, cpu = len(texts) / np.median(np.array(batch[name]), axis=0)
        row |= {"queries_a_second": wall, "queries_a_cpu_second": cpu}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="saved model, for example from recipes/demo.py")
    parser.add_argument("--data", required=True, help="data set of its training")
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 131_072, 1_305_265])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--queries", type=int, default=4096, help="number of test texts in a batch, which are also used for P@5"
    )
    parser.add_argument("--single", type=int, default=200, help="number of texts predicted one by one in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers_python", help="Python interpreter with omikuji and libpecos")
    parser.add_argument(
        "--peers_folder", type=Path, default=Path("runs/peers"), help="folder for the models of the peers"
    )
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)  # what a child process measures
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, *options.one)))
        return
    rows = []
    for num_labels in options.labels:
        for threads in options.threads:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, *sys.argv, "--one", str(num_labels), str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            rows += json.loads(done.stdout.splitlines()[-1])
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def table(rows: list[dict]) -> str:
    head = ["labels", "threads", "system", "p50 ms", "p95 ms", "p50 CPU ms", "queries a second", "a CPU second"]
    lines = [f"| {' | '.join([*head, 'recall@10', 'P@5'])} |", "|---" * 10 + "|"]
    for row in rows:
        times = [f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p50_cpu_ms")]
        rates = [f"{row[key]:,.0f}" for key in ("queries_a_second", "queries_a_cpu_second")]
        right = [f"{100 * row[key]:.1f}" if key in row else "-" for key in ("recall@10", "P@5")]
        cells = [f"{row['labels']:,}", str(row["threads"]), row["system"], *times, *rates, *right]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
