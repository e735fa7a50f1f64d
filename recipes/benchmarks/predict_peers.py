"""Run tree methods on tf-idf for `predict.py`, in a separate interpreter: they need older versions of numpy and scipy.

    pip install omikuji==0.5.2 libpecos==1.2.8 scikit-learn "numpy<2" "scipy<1.14"
    python predict_peers.py FOLDER --threads 1

FOLDER has `texts.json`, written by `predict.py`, and stores the trained models. Each line of standard input gets a line
of JSON: `{"peer": ..., "texts": [...], "top_k": 5, "one_by_one": false}` returns label ids, seconds and CPU seconds,
including tf-idf.
"""

import argparse
import json
import os
import pickle
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import omikuji
import scipy.sparse as sp
from pecos.xmc import Indexer, LabelEmbeddingFactory
from pecos.xmc.xlinear.model import XLinearModel
from sklearn.feature_extraction.text import TfidfVectorizer

TREES = {
    "Omikuji, Bonsai": {"cluster_k": 100, "cluster_balanced": False, "max_depth": 3},
    "Omikuji, Parabel": {"cluster_k": 2, "cluster_balanced": True},
}
BEAM = {"Omikuji, Bonsai": 10, "Omikuji, Parabel": 10, "PECOS XR-Linear": 64}


def features(folder: Path, data: dict) -> TfidfVectorizer:
    path = folder / "tfidf.pickle"
    if not path.exists():
        tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, dtype=np.float32).fit(data["texts"])
        path.write_bytes(pickle.dumps(tfidf))
    return pickle.loads(path.read_bytes())


def trained_omikuji(path: Path, rows: sp.csr_matrix, label_ids: list[list[int]], settings: dict, threads: int):
    if not path.exists():
        with path.with_suffix(".txt").open("w") as file:
            full = [row for row, ids in enumerate(label_ids) if ids and rows.indptr[row] < rows.indptr[row + 1]]
            print(len(full), rows.shape[1], 1 + max(map(max, label_ids)), file=file)
            for row in full:
                here = slice(rows.indptr[row], rows.indptr[row + 1])
                pairs = " ".join(f"{i}:{v:.6g}" for i, v in zip(rows.indices[here], rows.data[here], strict=True))
                print(",".join(map(str, label_ids[row])), pairs, file=file)
        hyper = omikuji.Model.default_hyper_param()
        for name, value in settings.items():
            setattr(hyper, name, value)
        omikuji.Model.train_on_data(str(path.with_suffix(".txt")), hyper, n_threads=threads).save(str(path))
    return omikuji.Model.load(str(path))


def trained_pecos(path: Path, rows: sp.csr_matrix, label_ids: list[list[int]], threads: int) -> XLinearModel:
    if not path.exists():
        indptr = np.cumsum([0, *map(len, label_ids)])
        size = (len(label_ids), 1 + max(map(max, label_ids)))
        relevance = sp.csr_matrix((np.ones(indptr[-1], np.float32), np.concatenate(label_ids), indptr), shape=size)
        about = LabelEmbeddingFactory.create(relevance, rows, method="pifa")
        chain = Indexer.gen(about, nr_splits=16, max_leaf_size=100)
        XLinearModel.train(rows, relevance, C=chain, threads=threads).save(str(path))
    return XLinearModel.load(str(path), is_predict_only=True)


def answers(model, name: str, rows: sp.csr_matrix, top_k: int, threads: int) -> list[list[int]]:
    if isinstance(model, XLinearModel):
        found = model.predict(rows, beam_size=BEAM[name], only_topk=top_k, threads=threads)
        return [
            found.indices[start:stop][np.argsort(-found.data[start:stop], kind="stable")].tolist()
            for start, stop in pairwise(found.indptr)
        ]
    label_ids = []
    for start, stop in pairwise(rows.indptr):
        query = list(zip(rows.indices[start:stop].tolist(), rows.data[start:stop].tolist(), strict=True))
        label_ids.append([label for label, _ in model.predict(query, beam_size=BEAM[name], top_k=top_k)])
    return label_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder written by predict.py")
    parser.add_argument(
        "--threads", type=int, default=1, help="number of threads of each library (default: %(default)s)"
    )
    options = parser.parse_args()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # omikuji logs to standard output
    data = json.loads((options.folder / "texts.json").read_text())
    tfidf = features(options.folder, data)
    rows, models = tfidf.transform(data["texts"]).astype(np.float32), {}
    for name in BEAM:
        path, start = options.folder / name.split()[-1].lower(), time.perf_counter()
        if name in TREES:
            models[name] = trained_omikuji(path, rows, data["label_ids"], TREES[name], options.threads)
        else:
            models[name] = trained_pecos(path, rows, data["label_ids"], options.threads)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(json.dumps({"ready": list(models)}), file=output, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        groups = [[text] for text in asked["texts"]] if asked["one_by_one"] else [asked["texts"]]
        label_ids, seconds, cpu_seconds = [], [], []
        for group in groups:
            start, cpu_start = time.perf_counter(), time.process_time()
            query = tfidf.transform(group).astype(np.float32)
            label_ids += answers(models[asked["peer"]], asked["peer"], query, asked["top_k"], options.threads)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        print(
            json.dumps({"label_ids": label_ids, "seconds": seconds, "cpu_seconds": cpu_seconds}),
            file=output,
            flush=True,
        )


if __name__ == "__main__":
    main()
