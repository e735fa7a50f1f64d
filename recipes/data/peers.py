"""What other systems reach on a data set, from tf-idf of words and pairs of words, one thread.

    pip install omikuji scikit-learn
    python recipes/data/peers.py --data hpo --json hpo.json

k nearest neighbours, the most frequent labels, and, where it is installed, omikuji's Parabel and Bonsai. Filter pairs
are left out; propensities as in `recipes/train.py`.
"""

import argparse
import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_xmc import XMCData, load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.metrics.frequency import inverse_propensity
from hf_xmc.metrics.ranking import evaluate_ranking

DEEP = 120  # places predicted, from which filter pairs are then taken out
METRICS = ("P@1", "P@3", "P@5", "PSP@5", "nDCG@5", "R@10", "R@100")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = load_xmc(options.data)
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, dtype=np.float32)
    known = vectorizer.fit_transform(data.train["text"])
    asked = vectorizer.transform(data.split(options.split)["text"])

    found, seconds = {}, {}
    frequent = np.argsort(-data.label_counts(), kind="stable")[:DEEP]
    found["most frequent"] = np.tile(frequent, (asked.shape[0], 1))
    found["k-NN, tf-idf"] = neighbours(known, data.relevance("train"), asked, options.neighbours)
    if find_spec("omikuji"):
        for name, settings in {
            "omikuji Parabel": {},
            "omikuji Bonsai": {"cluster_balanced": False, "cluster_k": 100, "max_depth": 3},
        }.items():
            start = time.process_time()
            found[name] = omikuji_trees(known, data, asked, settings)
            seconds[name] = time.process_time() - start
    weights = inverse_propensity(data.label_counts(), len(data.train))
    rows = {}
    for name, label_ids in found.items():
        pairs = data.filter_pairs.get(options.split)
        relevance = data.relevance(options.split)
        metrics = evaluate_ranking(label_ids, relevance, inverse_propensity=weights, filter_pairs=pairs)
        rows[name] = {metric: round(100 * metrics[metric], 2) for metric in METRICS}
        print(name, rows[name], f"{seconds[name]:.0f} s" if name in seconds else "", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def neighbours(known: sp.csr_matrix, relevance: sp.csr_array, asked: sp.csr_matrix, number: int) -> np.ndarray:
    """Votes of the most similar training queries, by the square of their cosine."""
    rows = []
    for start in range(0, asked.shape[0], 1000):
        similar = (asked[start : start + 1000] @ known.T).toarray()
        nearest = np.argpartition(-similar, number, axis=1)[:, :number]
        weights = np.take_along_axis(similar, nearest, axis=1) ** 2
        offsets = np.arange(len(nearest) + 1) * number
        votes = sp.csr_array((weights.ravel(), nearest.ravel(), offsets), shape=similar.shape) @ relevance
        rows.append(np.argsort(-votes.toarray(), axis=1, kind="stable")[:, :DEEP])
    return np.concatenate(rows)


def omikuji_trees(known: sp.csr_matrix, data: XMCData, asked: sp.csr_matrix, settings: dict) -> np.ndarray:
    """Three trees of omikuji, searched with a beam of 64."""
    import omikuji

    parameters = omikuji.Model.default_hyper_param()
    for name, value in settings.items():
        setattr(parameters, name, value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        with path.open("w") as file:
            file.write(f"{known.shape[0]} {known.shape[1]} {data.num_labels}\n")
            for row, label_ids in enumerate(data.train["label_ids"]):
                part = known[row]
                features = sorted(zip(part.indices, part.data, strict=True)) or [(0, 1e-6)]  # it refuses a row without
                cells = " ".join(f"{index}:{value:.6g}" for index, value in features)
                file.write(f"{','.join(map(str, label_ids))} {cells}\n")
        model = omikuji.Model.train_on_data(str(path), parameters, n_threads=1)
    found = np.full((asked.shape[0], DEEP), -1)
    for row in range(asked.shape[0]):
        part = asked[row]
        pairs = sorted(zip(part.indices.tolist(), part.data.tolist(), strict=True))
        labels = [label for label, _ in model.predict(pairs, beam_size=64, top_k=DEEP)]
        found[row, : len(labels)] = labels
    return found


if __name__ == "__main__":
    main()
