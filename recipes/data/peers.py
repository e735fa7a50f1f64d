"""Measure other systems on a data set, with tf-idf of words and pairs of words, on one thread.

    pip install omikuji scikit-learn
    python recipes/data/peers.py --data hpo --json hpo.json

The systems are k nearest neighbours, the most frequent labels, and, if installed, omikuji's Parabel and Bonsai. Filter
pairs are left out, and propensities are those of `recipes/train.py`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from hf_xmc import XMCData, load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.experiment.baselines import DEEP, has_omikuji, neighbors, omikuji_trees, tfidf
from hf_xmc.metrics.frequency import inverse_propensity
from hf_xmc.metrics.ranking import evaluate_ranking

METRICS = ("P@1", "P@3", "P@5", "PSP@5", "nDCG@5", "R@10", "R@100")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data, known, asked = read(options.data, options.split)
    found, seconds = {}, {}
    frequent = np.argsort(-data.label_counts(), kind="stable")[:DEEP]
    found["most frequent"] = np.tile(frequent, (asked.shape[0], 1))
    found["k-NN, tf-idf"] = neighbors(known, data.relevance("train"), asked, options.neighbours)
    if has_omikuji():
        for name, settings in {
            "omikuji Parabel": {},
            "omikuji Bonsai": {"cluster_balanced": False, "cluster_k": 100, "max_depth": 3},
        }.items():
            start = time.process_time()
            found[name] = omikuji_trees(known, data, asked, settings)
            seconds[name] = time.process_time() - start
    rows = {}
    for name, label_ids in found.items():
        rows[name] = measure(data, options.split, label_ids)
        print(name, rows[name], f"{seconds[name]:.0f} s" if name in seconds else "", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def read(path: str, split: str) -> tuple[XMCData, sp.csr_matrix, sp.csr_matrix]:
    """Return a data set, and the tf-idf features of its training texts and of a split."""
    data = load_xmc(path)
    features = tfidf(data.train["text"][:], data.split(split)["text"][:])
    if features is None:
        raise SystemExit(1)  # the warning of tfidf says why
    return data, *features


def measure(data: XMCData, split: str, label_ids: np.ndarray) -> dict[str, float]:
    """Return the metrics of predicted labels ``(N, k)`` of a split, in percent."""
    weights = inverse_propensity(data.label_counts(), len(data.train))
    pairs = data.filter_pairs.get(split)
    metrics = evaluate_ranking(label_ids, data.relevance(split), inverse_propensity=weights, filter_pairs=pairs)
    return {metric: round(100 * metrics[metric], 2) for metric in METRICS}


if __name__ == "__main__":
    main()
