"""Measure PECOS XR-Linear as ``peers.py`` measures other systems; PECOS runs in another interpreter, on one thread.

    python -m venv peers && peers/bin/pip install libpecos==1.2.8 "numpy<2" "scipy<1.14"
    python recipes/data/peers_pecos.py --data hpo --peers_python peers/bin/python --json hpo-pecos.json

PECOS needs older versions of numpy and scipy than this package. It gets the same tf-idf features, clusters labels by
PIFA into leaves of 100 with 16 children per node, and searches with a beam of 64. The seconds are CPU seconds of
training and of the prediction for the whole split, without tf-idf.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.sparse as sp

DEEP, BEAM = 120, 64


def run_pecos(folder: Path) -> None:
    """Train and predict, from matrices in a folder to label ids in it, with nothing of this package."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    known, relevance, asked = (sp.load_npz(folder / f"{name}.npz") for name in ("known", "relevance", "asked"))
    start = time.process_time()
    about = LabelEmbeddingFactory.create(relevance, known, method="pifa")
    clusters = Indexer.gen(about, nr_splits=16, max_leaf_size=100)
    model = XLinearModel.train(known, relevance, C=clusters, threads=1)
    trained = time.process_time()
    scores = model.predict(asked, beam_size=BEAM, only_topk=DEEP, threads=1)
    seconds = {"training": trained - start, "prediction": time.process_time() - trained}
    found = np.full((asked.shape[0], DEEP), -1)
    for row, (first, last) in enumerate(pairwise(scores.indptr)):
        best = np.argsort(-scores.data[first:last], kind="stable")
        found[row, : last - first] = scores.indices[first:last][best]
    np.save(folder / "found.npy", found)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def main() -> None:
    from peers import measure, read

    from hf_xmc.cli import HelpFormatter

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--peers_python", required=True, help="Python interpreter with libpecos")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data, known, asked = read(options.data, options.split)
    relevance = sp.csr_matrix(data.relevance("train") > 0, dtype=np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, matrix in {"known": known, "relevance": relevance, "asked": asked}.items():
            sp.save_npz(folder / f"{part}.npz", sp.csr_matrix(matrix), compressed=False)
        subprocess.run([options.peers_python, __file__, "--run", name], check=True)
        found, seconds = np.load(folder / "found.npy"), json.loads((folder / "seconds.json").read_text())
    row = measure(data, options.split, found)
    print("PECOS XR-Linear", row, {part: round(value, 1) for part, value in seconds.items()})
    if options.json:
        options.json.write_text(json.dumps({**row, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_pecos(Path(sys.argv[2]))
    else:
        main()
