"""``hf-xmc prepare`` and ``hf-xmc index``: write data sets and models that load fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_xmc.cli.streams import read_lines, write_row


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands to those of ``hf-xmc``."""
    prepare = add("prepare", help="check a data set and convert it to a format that loads fast")
    prepare.add_argument("data", help="file or folder in any form that load_xmc reads, or a data set on the Hub")
    prepare.add_argument(
        "output_dir", type=Path, nargs="?", help="output folder; without it, the data set is only checked"
    )
    prepare.add_argument("--text", help="text columns of a table, such as title,abstract")
    prepare.add_argument("--labels", help="column of a table with the labels of a text")
    prepare.add_argument("--separator", help="separator of labels in that column")
    prepare.add_argument("--vocabulary", help="file of all labels: names, uids and texts, or a thesaurus in SKOS")
    _add_language(prepare)
    prepare.set_defaults(run=_prepare)

    index = add("index", help="embed labels and save a model for prediction")
    index.add_argument("encoder", help="sentence-transformers model: a folder, or a model on the Hub")
    index.add_argument(
        "--labels",
        required=True,
        help="text file with one label per line, any other vocabulary such as a thesaurus in SKOS, or a data set",
    )
    _add_language(index)
    index.add_argument("--output_dir", type=Path, required=True, help="output folder for the model")
    index.set_defaults(run=_index)


def _add_language(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", default="en", help="language of label texts, if a vocabulary has several")


def _prepare(arguments: argparse.Namespace) -> None:
    from hf_xmc.data.loading import load_xmc

    options = {name: getattr(arguments, name) for name in ("labels", "separator", "vocabulary", "language")}
    data = load_xmc(arguments.data, text=arguments.text and arguments.text.split(","), **options)
    if arguments.output_dir is not None:
        data.save(arguments.output_dir)
    splits = {name: len(split) for name in ("train", "validation", "test") if (split := getattr(data, name))}
    write_row({"num_labels": data.num_labels, **splits, "load_report": dict(data.load_report)})


def _index(arguments: argparse.Namespace) -> None:
    from hf_xmc.hub.release import check_target
    from hf_xmc.model.model import XMCModel

    check_target(arguments.output_dir)  # before the labels are embedded
    labels = _labels(arguments.labels, arguments.language)
    model = XMCModel.from_pretrained(arguments.encoder, labels=labels)
    model.save_pretrained(arguments.output_dir)
    write_row({"num_labels": len(model.labels), "model": str(arguments.output_dir)})


def _labels(name: str, language: str) -> Any:
    from hf_xmc.data.loading import load_xmc
    from hf_xmc.data.readers.vocabularies import is_vocabulary
    from hf_xmc.data.vocabulary import Vocabulary

    if not Path(name).is_file():
        return load_xmc(name).labels
    if is_vocabulary(Path(name)) and Path(name).suffix != ".txt":
        return Vocabulary.read(name, language).labels
    texts = list(read_lines(Path(name)))
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError(f"{name}, line {number}: the label must not be empty.")
    return texts
