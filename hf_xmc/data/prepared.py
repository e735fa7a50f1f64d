"""Prepared data sets on disk: memory-mapped tables, and a file that lists the tables of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk

from hf_xmc.data.progress import no_bar_for_few
from hf_xmc.data.readers.tables import LABELS, QUERIES, Columns
from hf_xmc.storage.folders import atomic_folder, check_replaceable

PREPARED = "xmc_data.json"  # written last: without it, a folder is not a prepared data set
FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
SAMPLED = 10_000  # number of texts of a table in its digest


class Parts(NamedTuple):
    """The parts of a prepared data set."""

    tables: dict[str, Dataset]  # "labels" and the splits, with the required columns
    filter_pairs: dict[str, np.ndarray]
    load_report: dict[str, int]


def write(
    folder: Path, tables: Mapping[str, Dataset], filter_pairs: Mapping[str, np.ndarray], load_report: Mapping[str, int]
) -> None:
    """Write a prepared data set. The folder is written completely or not at all.

    Raises:
        ValueError: if the folder has other content, which stays unchanged.
    """
    check_replaceable(folder, PREPARED, "is not a prepared data set")
    with atomic_folder(folder) as new:
        for name, table in tables.items():
            with no_bar_for_few(len(table)):
                table.save_to_disk(new / name)
        filter_pairs = {name: np.reshape(pairs, (-1, 2)) for name, pairs in filter_pairs.items()}
        for name, pairs in filter_pairs.items():
            np.save(_pairs_file(new, name), pairs)
        about = {
            "format_version": FORMAT_VERSION,
            "rows": {name: len(table) for name, table in tables.items()},
            "filter_pairs": {name: len(pairs) for name, pairs in filter_pairs.items()},
            "digests": {name: digest(table) for name, table in tables.items()}
            | {f"filter_pairs_{name}": _digest_of_pairs(pairs) for name, pairs in filter_pairs.items()},
            "load_report": dict(load_report),
        }
        (new / PREPARED).write_text(json.dumps(about, indent=2))


def read(folder: Path) -> Parts:
    """Read a data set written by :func:`write`, and check its parts.

    Raises:
        ValueError: if a part is missing, damaged, or different from the saved one. The message names it.
    """
    about = _read_about(folder / PREPARED)
    tables, pairs = {}, {}
    for name, rows in about["rows"].items():
        tables[name] = _read_table(folder / name)
        if len(tables[name]) != rows:
            raise ValueError(
                f"{folder / name} has {len(tables[name])} rows, expected {rows}. Prepare the data set again."
            )
    for name in SPLITS:
        if name not in tables and (folder / name).exists():
            raise ValueError(f"{folder / name} exists, but {PREPARED} does not list it. Prepare the data set again.")
    for name, rows in about["filter_pairs"].items():
        path = _pairs_file(folder, name)
        try:
            pairs[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}). Prepare the data set again.") from None
        if pairs[name].shape != (rows, 2):
            raise ValueError(f"{path} has shape {pairs[name].shape}, expected ({rows}, 2). Prepare the data set again.")
    digests = {name: digest(table) for name, table in tables.items()}
    digests |= {f"filter_pairs_{name}": _digest_of_pairs(array) for name, array in pairs.items()}
    for name, expected in about.get("digests", digests).items():  # missing in older folders
        if digests.get(name) != expected:
            raise ValueError(
                f"{folder / name} differs from the part that was saved with this data set, so it may have been "
                "replaced or swapped. Prepare the data set again."
            )
    return Parts(tables, pairs, about["load_report"])


def digest(table: Dataset) -> str:
    """Return a SHA-256 of the required columns: all numbers, the lengths of all texts, and a sample of the texts.

    It does not read every text, so that a large data set opens quickly.
    """
    found = hashlib.sha256(str(len(table)).encode())
    for name in _columns_of(table):
        found.update(name.encode())
        column = table.with_format("arrow").select_columns(name)[:][name]
        if name in ("label_ids", "label_scores") and not pa.types.is_null(column.type):
            lists = column.combine_chunks()
            lengths, values = pc.list_value_length(lists), pc.list_flatten(lists)
            found.update(np.asarray(lengths.cast(pa.int64())).tobytes())
            found.update(np.asarray(values.cast(pa.float64() if name == "label_scores" else pa.int64())).tobytes())
            continue
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found.update(np.asarray(pc.binary_length(column).cast(pa.int64())).tobytes())
        places = np.unique(np.linspace(0, max(0, len(table) - 1), min(SAMPLED, len(table)), dtype=np.int64))
        found.update(json.dumps(table.select(places)[name][:], default=str).encode())
    return found.hexdigest()


def _digest_of_pairs(pairs: np.ndarray) -> str:
    return hashlib.sha256(f"{pairs.dtype}".encode() + pairs.tobytes()).hexdigest()


def _columns_of(table: Dataset) -> list[str]:
    columns: Columns = QUERIES if "label_ids" in table.column_names else LABELS
    return [name for name in (*columns.required, *columns.optional) if name in table.column_names]


def _pairs_file(folder: Path, split: str) -> Path:
    return folder / f"filter_pairs_{split}.npy"


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        version = about.get("format_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Prepare the data set again.") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path.parent} was prepared in format {version}, but this version reads {FORMAT_VERSION}. "
            "Prepare it again."
        )
    kinds = {name: isinstance(about.get(name), dict) for name in ("rows", "filter_pairs", "load_report")}
    if not all(kinds.values()) or not {"labels", "train"} <= about["rows"].keys() <= {"labels", *SPLITS}:
        raise ValueError(
            f"{path} is damaged: expected rows of labels, train and optionally validation and test, filter_pairs and "
            "load_report. Prepare the data set again."
        )
    return dict(about)


def _read_table(folder: Path) -> Dataset:
    try:
        table = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is missing or damaged ({error}). Prepare the data set again.") from None
    if not isinstance(table, Dataset):
        raise ValueError(f"{folder} must be a single table, got a {type(table).__name__}. Prepare the data set again.")
    columns = LABELS if folder.name == "labels" else QUERIES
    return table.select_columns(columns.among(table.column_names, str(folder)))
