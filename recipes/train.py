"""Train a dual encoder with all labels as negatives.

    accelerate launch recipes/train.py recipes/static.yaml --data recipes/data/wordnet-hypernyms --output_dir runs/x

Settings may be in YAML files, where later files override earlier ones, and flags after them override both. `--help`
lists the most common settings, and `--help-all` also those of `XMCTrainingArguments`. The script writes `model/` (load
it with `XMCModel.from_pretrained`), `metrics.json` and `history.json`. The model is saved as soon as it is trained, and
again with its memory and calibration. The data need no test or validation split: steps that need one are skipped with a
message.
"""

import sys

from hf_xmc.cli.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
