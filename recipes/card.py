"""Write the model card of a finished run into its model folder, and optionally to a second path.

python recipes/card.py --run runs/demo --data recipes/data/wordnet-hypernyms --output model_cards/static.md
"""

import argparse
from pathlib import Path

from hf_xmc import load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.experiment.card import write_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a finished run")
    parser.add_argument("--data", required=True, help="data set of the run")
    parser.add_argument("--output", type=Path, help="second path for the card")
    for name in ("name", "repo_id", "dataset_id", "license", "language"):
        parser.add_argument(f"--{name}", help="for the card")
    options = vars(parser.parse_args())
    run, data, output = (options.pop(name) for name in ("run", "data", "output"))
    about = {name: value for name, value in options.items() if value}
    card = write_card(run, load_xmc(data), Path(data).name, **about)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(card.render(), encoding="utf-8")
    print(run / "model" / "README.md")


if __name__ == "__main__":
    main()
