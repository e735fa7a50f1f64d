"""Settings of an experiment and training arguments from YAML files and options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_xmc.experiment.settings import ARGUMENTS, CHOSEN, GROUPS, Parsed, from_dict
from hf_xmc.training.arguments import XMCTrainingArguments

HELP = {  # training arguments in the words of this package
    "output_dir": "Folder for the results.",
    "per_device_train_batch_size": "Number of texts in a batch of one process.",
    "num_train_epochs": "Number of passes over the training texts.",
    "learning_rate": "Highest learning rate.",
    "resume_from_checkpoint": "`true` continues the last run in output_dir; or the folder of a checkpoint.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
    "seed": "Seed of all random numbers.",
}
OFTEN = {"help", "help_all", "data", "text", "labels", "separator", "vocabulary", "language", "unknown", "encoding"}
OFTEN |= {"validation_size", "model", "preset", "max_seq_length", "loss", "temperature", "rarity", "memory", *HELP}
OFTEN |= {"label_mode"}  # shown by `--help`


class HelpAll(argparse.Action):
    """Show the help of all options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        parser.exit()


def parser(everything: bool = False, **options: Any) -> HfArgumentParser:
    """Return the parser of all settings and training arguments.

    Args:
        everything: Whether the help shows all of them, instead of those that most runs need.
        options: Arguments of ``ArgumentParser``.
    """
    made = HfArgumentParser((*GROUPS, XMCTrainingArguments), allow_abbrev=False, **options)  # type: ignore[arg-type]
    made.set_defaults(**ARGUMENTS, **CHOSEN)  # only for --help
    made.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all options")
    for action in made._actions:  # argparse has no other list of them
        if not everything and action.dest not in OFTEN:
            action.help = argparse.SUPPRESS
        elif "--no_memory" in action.option_strings:
            action.help = "Train without that memory."
        elif action.dest in HELP:
            action.help = HELP[action.dest]
    return made


def parse(argv: Sequence[str], **options: Any) -> Parsed:
    """Return the settings from optional YAML files, and from the flags after them.

    Args:
        argv: YAML files, where later files override earlier ones, and the data unless ``--data`` is given; then flags,
            which override the files. ``null`` in a file removes a setting.
        options: Arguments of :func:`parser`.

    Raises:
        ValueError: if a setting is invalid.
    """
    argv, values = list(argv), dict[str, Any]()
    while argv and not argv[0].startswith("-"):
        word = argv.pop(0)
        if word.endswith((".yaml", ".yml")):
            values |= _read_yaml(Path(word))
        else:
            values["data"] = word
    flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    missing = object()
    blank = argparse.Namespace(**{f.name: missing for kind in (*GROUPS, XMCTrainingArguments) for f in fields(kind)})
    made = parser("--help-all" in argv, **options)
    wants_help = {"-h", "--help", "--help-all"} & {*argv}
    if "data" not in values and not wants_help and not any(word.split("=")[0] == "--data" for word in argv):
        made.error("name the data first: a table such as books.csv, a folder, or a data set of the Hub")
    parsed, rest = made.parse_known_args([*flags, *argv], namespace=blank)
    if rest:
        made.error(_unknown_argument(rest[0], [name for name in made._option_string_actions if "-" not in name[2:]]))
    return from_dict({name: value for name, value in vars(parsed).items() if value is not missing})


def _unknown_argument(word: str, options: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no option. Quote a value that holds blanks, as in --text 'title,abstract'"
    name = word.split("=", maxsplit=1)[0].replace("-", "_").strip("_")
    close = [f"--{name}"] if f"--{name}" in options else [option for option in options if name and name in option]
    close = close or get_close_matches(f"--{name}", options)
    return f"{word} is not an option." + (f" Did you mean {' or '.join(close[:3])}?" if close else " See --help-all")


def _read_yaml(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must have one setting per line, such as `model: static`, got {type(values).__name__}."
        )
    return values
