"""Run everything from end to end: train, evaluate, index, predict, and write a report.

python recipes/demo.py --data recipes/data/wordnet-hypernyms --output_dir runs/demo
"""

import argparse
import json
from pathlib import Path

from hf_xmc.cli import HelpFormatter
from hf_xmc.cli.train import main as train

RECIPE = Path(__file__).with_name("static.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="folder in any layout that load_xmc reads")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("train_flags", nargs="*", help="after `--`: flags of train.py, such as --num_train_epochs 1")
    arguments = parser.parse_args()
    where = ["--data", arguments.data, "--output_dir", str(arguments.output_dir)]
    short = ["--save_strategy", "no"]  # a run of a few minutes needs no checkpoints
    train([str(RECIPE), *where, *short, *arguments.train_flags])
    metrics = json.loads((arguments.output_dir / "metrics.json").read_text())
    if calibration := metrics.get("calibration"):
        reached = ", ".join(
            f"{row['wanted']:.0%}: {row['precision']:.1%}" for row in calibration["thresholds"] if row["precision"]
        )
        before, after = calibration["ECE@5 before"], calibration["ECE@5"]
        print(f"ECE@5 {before:.3f}, calibrated {after:.3f}; target and actual precision of thresholds: {reached}")
    model, page = (arguments.output_dir / name for name in ("model", "report.html"))
    print(f"trained in {metrics['train_seconds']:.0f} s; the model is {model}, the report {page}")


if __name__ == "__main__":
    main()
