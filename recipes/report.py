"""Write the report of a finished run: curves, metrics and those of other systems, label frequencies, ten predictions.

python recipes/report.py --run runs/demo --data recipes/data/wordnet-hypernyms
"""

import argparse
from pathlib import Path

from hf_xmc import load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.experiment.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a finished run")
    parser.add_argument("--data", required=True, help="data set of the run")
    options = parser.parse_args()
    folder = Path(options.data)
    print(write_report(options.run, load_xmc(options.data), folder.name, folder / "peers.json"))


if __name__ == "__main__":
    main()
