"""Measure a release with many labels: its size, and the time and memory to save, push, pull, load and predict.

    python recipes/benchmarks/release.py --num_labels 1300000 --embedding_dim 384 --json release.json

Labels are generated (about 38 characters each) and have random embeddings, because nothing here depends on their text.
Each stage is a separate process. It pushes to and pulls from the tests' server on this machine, so times include disk,
hashing and client, but no network. Memory is what a stage adds to the peak of a process that has imported everything
and loaded the encoder; for `predict` it includes loading.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hf_xmc.cli import HelpFormatter

TESTS = Path(__file__).parents[2] / "tests"
REPOSITORY = "org/many-labels"
STAGES = ("save", "push", "pull", "load", "predict")
WORDS = [
    "wooden",
    "sailing",
    "boat",
    "steel",
    "kitchen",
    "knife",
    "child",
    "book",
    "history",
    "hose",
    "winter",
    "red",
    "a",
]


def serve() -> None:
    """Run the tests' server until its standard input closes."""
    sys.path.insert(0, str(TESTS))
    from helpers.hub_server import Hub

    print(Hub().url, flush=True)
    sys.stdin.read()


def make_model(num_labels: int, embedding_dim: int):
    from datasets import Dataset

    from hf_xmc import XMCModel, static_encoder

    encoder = static_encoder([" ".join(WORDS)], embedding_dim=embedding_dim, device="cpu")
    texts = [" ".join([*(WORDS[i % prime] for prime in (13, 11, 7, 5, 3)), str(i)]) for i in range(num_labels)]
    labels = Dataset.from_dict({"uid": [f"B{i:09d}" for i in range(num_labels)], "text": texts})
    generator = torch.Generator().manual_seed(0)
    return XMCModel(encoder, labels, torch.empty(num_labels, embedding_dim).normal_(generator=generator))


def measure(stage: str, folder: Path, num_labels: int, embedding_dim: int) -> dict[str, float]:
    """Return the seconds of a stage, and the bytes that it added to the peak of this process."""
    from sentence_transformers import SentenceTransformer

    from hf_xmc import XMCModel
    from hf_xmc.hub import repository

    saved = folder / "saved"
    if stage == "save":
        model = make_model(num_labels, embedding_dim)
    else:
        SentenceTransformer(str(saved), device="cpu").encode_query(["a red boat"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if stage == "predict":  # time of one text, but memory of the whole process
        model = XMCModel.from_pretrained(REPOSITORY)
    start = time.perf_counter()
    if stage == "save":
        model.save_pretrained(saved)
    elif stage == "push":
        repository.push(saved, REPOSITORY)
    elif stage == "pull":
        repository.find(REPOSITORY)
    elif stage == "load":
        XMCModel.from_pretrained(REPOSITORY)
    else:
        model.predict(["a red boat"])
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "added": 1024 * (after - before), "peak": 1024 * after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--num_labels", type=int, default=1_300_000)
    parser.add_argument("--embedding_dim", type=int, default=384)
    parser.add_argument("--folder", type=Path, help="folder for the release; by default a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", choices=("serve", *STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage == "serve":
        return serve()
    if options.stage:
        print(json.dumps(measure(options.stage, options.folder, options.num_labels, options.embedding_dim)))
        return None
    with TemporaryDirectory(dir=options.folder) as folder:
        report = run(options, Path(folder))
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, default=str))
    return None


def run(options: argparse.Namespace, folder: Path) -> dict:
    command = [sys.executable, __file__, "--num_labels", options.num_labels, "--embedding_dim", options.embedding_dim]
    command = [*map(str, command), "--folder", str(folder), "--stage"]
    with subprocess.Popen([*command, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_any",
        }
        environment |= {"HF_HOME": str(folder / "cache"), "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
        stages = {}
        for stage in STAGES:
            done = subprocess.run([*command, stage], capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise RuntimeError(f"{stage} failed:\n{done.stderr}")
            stages[stage] = json.loads(done.stdout.splitlines()[-1])
            print(stage, stages[stage], flush=True)
        server.kill()
    saved = folder / "saved"
    sizes = {path.relative_to(saved).as_posix(): path.stat().st_size for path in saved.rglob("*") if path.is_file()}
    embeddings = 4 * options.num_labels * options.embedding_dim
    return {"options": vars(options), "embeddings": embeddings, "sizes": sizes, "stages": stages}


def table(report: dict) -> str:
    mib, embeddings = 2**20, report["embeddings"]
    lines = ["| file | MiB |", "|---|---|"]
    large = {name: size for name, size in report["sizes"].items() if size > mib}
    lines += [f"| {name} | {size / mib:.1f} |" for name, size in large.items()]
    lines.append(f"| everything | {sum(report['sizes'].values()) / mib:.1f} |")
    lines += ["", "| stage | seconds | memory added, MiB | per byte of the embeddings |", "|---|---|---|---|"]
    for stage, found in report["stages"].items():
        added = found["added"]
        lines.append(f"| {stage} | {found['seconds']:.2f} | {added / mib:.0f} | {added / embeddings:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
