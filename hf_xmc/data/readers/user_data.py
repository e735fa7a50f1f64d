"""Users' data sets with label names or uids: one table, or a folder with a table per split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_xmc.data.named import assemble_named
from hf_xmc.data.prepared import PREPARED, SPLITS, Parts
from hf_xmc.data.readers.delimited import read_csv_rows, suffix_of
from hf_xmc.data.readers.formats import read_lines
from hf_xmc.data.readers.tables import PAIRS, read_table
from hf_xmc.data.readers.text2text import check_not_alone
from hf_xmc.data.readers.user_files import FILE_SUFFIXES, TableChoice, read_user_table
from hf_xmc.data.readers.vocabularies import READERS
from hf_xmc.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def load_user_data(
    path: Path, choice: TableChoice, vocabulary: Any = None, unknown: str = "error", language: str = "en"
) -> Parts:
    """Return the parts of a data set in a file, or in the files ``train``, ``validation`` and ``test`` of a folder.

    A file ``labels`` in the folder is the vocabulary, unless another one is given. A file ``filter_pairs`` has the
    filter pairs of the test split, in columns ``row`` and ``label``.

    Raises:
        ValueError: if a file cannot be read, two files name the same split, or a label is not in the vocabulary.
    """
    check_not_alone(path)
    report = Counter[str]()
    files = {"train": path} if path.is_file() else split_files(path)
    if vocabulary is None and path.is_dir() and (found := _file(path, "labels", tuple(READERS))):
        logger.info("%s: the vocabulary is %s.", path, found.name)
        vocabulary = Vocabulary.read(found, language)
    rows, flags = {}, None
    for name, file in files.items():
        rows[name], chosen = read_user_table(file, choice, report)
        flags = flags if isinstance(chosen.labels, str) else list(chosen.labels)
    given = vocabulary if vocabulary is not None else flags
    labels = None if given is None else Vocabulary.of(given)
    found = _file(path, "filter_pairs", FILE_SUFFIXES) if path.is_dir() else None
    pairs = {"test": _pairs(found, report)} if found else {}
    return assemble_named(rows, labels, unknown=unknown, filter_pairs=pairs, load_report=report)


def _pairs(path: Path, report: Counter[str]) -> list[tuple[int, Any]]:
    """Return the filter pairs in a table: the row of a query, counted from 0, and the name or uid of a label."""
    if suffix_of(path) not in (".csv", ".tsv"):
        table = read_table(path, PAIRS, str(path), report)
        return list(zip(table["row"], table["label"], strict=True))
    pairs = []
    for cells, where in read_csv_rows(path, report):
        if missing := {"row", "label"} - cells.keys():
            raise ValueError(f"{path}: there is no column {', '.join(sorted(missing))}, only {', '.join(cells)}.")
        try:
            pairs.append((int(cells["row"]), cells["label"]))
        except ValueError:
            raise ValueError(f"{where}: row must be a whole number, counted from 0, got {cells['row']!r}.") from None
    return pairs


def holds_names(folder: Path) -> bool:
    """Return whether a folder contains tables of texts and label names: a table ``train`` without ``label_ids``.

    A folder with files of another layout does not count.
    """
    train = _train(folder)
    if train is None or (folder / PREPARED).exists() or (folder / "README.md").exists():
        return False
    kind = suffix_of(train)
    if kind in (".csv", ".tsv"):
        return True
    if kind == ".parquet":
        try:
            names = set(pq.read_schema(train).names)
        except (pa.ArrowException, OSError):  # the reader reports them
            return False
    else:
        try:
            first, _ = next(read_lines(train, Counter(), "replace"))
            names = set(json.loads(first))
        except (ValueError, TypeError, RecursionError, StopIteration):
            return False
    return "label_ids" not in names and ("labels" in names or not _file(folder, "labels", (".jsonl", ".parquet")))


def split_files(folder: Path) -> dict[str, Path]:
    """Return the tables of a folder that are named after splits.

    Raises:
        ValueError: if a split has two tables, or ``train`` is missing.
    """
    files = {name: file for name in SPLITS if (file := _file(folder, name, FILE_SUFFIXES))}
    if "train" not in files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:20])
        raise ValueError(f"{folder} must contain a table train ({', '.join(FILE_SUFFIXES)}), got {found or 'no file'}.")
    return files


def _train(folder: Path) -> Path | None:
    return next((path for suffix in FILE_SUFFIXES if (path := folder / f"train{suffix}").is_file()), None)


def _file(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path | None:
    found = [path for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are the same table. Remove one of them.")
    return found[0] if found else None
