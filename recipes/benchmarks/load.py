"""Load models with many labels, with and without hashing their files: processor time and memory.

    python recipes/benchmarks/load.py --num_labels 19000 131000 1300000

The labels and their embeddings are those of release.py. Each load is a process of its own, which has imported all
before and reads files that the system has cached. Times are of the processor, summed over threads. `private` is memory
that each process needs for itself. `mapped` is that of the label embeddings, which are mapped into memory: processes
share it, and the system may drop it. `peak` is the most of both during the load. All are without what was there before.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from release import make_model

from hf_xmc.cli import HelpFormatter

UNITS = {"RssAnon": "private_mib", "RssFile": "mapped_mib", "VmHWM": "peak_mib"}


def memory() -> dict[str, float]:
    """Return the memory of this process, as Linux counts it, in MiB."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {row[0].rstrip(":"): row[1:2] for row in rows if row}
    return {UNITS[name]: int(found[name][0]) / 1024 for name in UNITS}


def measure(folder: Path, verify: bool) -> dict[str, float]:
    """Return the processor seconds of a load in this process, and the memory that it added."""
    from sentence_transformers import SentenceTransformer

    from hf_xmc import XMCModel

    SentenceTransformer(str(folder), device="cpu").encode_query(["a red boat"])  # imports are not measured
    before, start = memory(), time.process_time()
    model = XMCModel.from_pretrained(folder, device="cpu", verify=verify)
    seconds, after = time.process_time() - start, memory()
    assert len(model.predict("a red boat")) > 0
    return {"cpu_seconds": round(seconds, 2), **{name: round(after[name] - before[name], 1) for name in after}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--num_labels", type=int, nargs="+", default=[19_000, 131_000, 1_300_000])
    parser.add_argument("--embedding_dim", type=int, default=384)
    parser.add_argument("--folder", type=Path, help="folder for the models; by default a temporary folder")
    parser.add_argument("--stage", choices=("save", "verify", "no-verify"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage == "save":
        make_model(options.num_labels[0], options.embedding_dim).save_pretrained(options.folder)
    elif options.stage:
        print(json.dumps(measure(options.folder, options.stage == "verify")))
    else:
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=options.folder) as folder:
            for num_labels in options.num_labels:
                run(num_labels, options.embedding_dim, Path(folder, "model"))


def run(num_labels: int, embedding_dim: int, folder: Path) -> None:
    """Save a model, and print a line for each way to load it."""
    command = [sys.executable, __file__, "--num_labels", num_labels, "--embedding_dim", embedding_dim]
    for stage in ("save", "verify", "no-verify"):
        given = [*map(str, command), "--folder", str(folder), "--stage", stage]
        done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True)
        if stage != "save":
            about = {"num_labels": num_labels, "embeddings_mib": round(4 * num_labels * embedding_dim / 2**20, 1)}
            print(json.dumps({**about, "load": stage, **json.loads(done.stdout.splitlines()[-1])}), flush=True)


if __name__ == "__main__":
    main()
