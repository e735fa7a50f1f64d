"""Read the texts of ``hf-xmc predict``: arguments, lines, the rows of a table, or a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_xmc.cli.streams import read_lines
from hf_xmc.cli.tables import TableReader

ROWS_AT_ONCE = 1000  # of a data set that are read at a time


@dataclass(frozen=True)
class Source:
    """Rows, and the text of a row.

    Attributes:
        rows: Iterator of strings, or of the rows of ``table``.
        text: Function from a row to its text.
        table: The table that the rows belong to, if any.
    """

    rows: Iterator[Any]
    text: Callable[[Any], str] = str
    table: TableReader | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Source:
        """Return the source that the arguments of ``hf-xmc predict`` name.

        Raises:
            ValueError: if a column does not exist, or a data set has no such split.
            OSError: if a file or a data set does not exist.
        """
        if arguments.data:
            return cls(_read_data_set(arguments.data, arguments.split, (arguments.text or "text").split(",")))
        if arguments.text:
            table = TableReader(arguments.file, arguments.text.split(","))
            return cls(iter(table), table.text, table)
        return cls(iter(arguments.texts or read_lines(arguments.file)))


def check_source(arguments: argparse.Namespace) -> None:
    """Check that the arguments of ``hf-xmc predict`` name one source.

    Raises:
        ValueError: if they name several, or a table without its text columns.
    """
    if arguments.texts and (arguments.file or arguments.text or arguments.data):
        raise ValueError("texts must be given either as arguments or with --file or --data, not both.")
    if arguments.file and arguments.data:
        raise ValueError("texts must be given either with --file or with --data, not both.")
    if arguments.split and not arguments.data:
        raise ValueError("--split needs the data set that it belongs to. Pass it as --data.")
    name = "" if arguments.file is None else arguments.file.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")) and not arguments.text:
        found = ", ".join(TableReader(arguments.file, []).header)
        raise ValueError(f"--text must name the text columns of the table {arguments.file}, got {found}.")


def _read_data_set(name: str, split: str | None, columns: list[str]) -> Iterator[str]:
    from datasets import Dataset, load_dataset, load_from_disk

    saved = any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
    found = load_from_disk(name) if saved else load_dataset(name)
    if not isinstance(found, Dataset):
        if split not in found:
            raise ValueError(f"--split must be one of {', '.join(found)}, which {name} has, got {split}.")
        found = found[split]
    elif split:
        raise ValueError(f"--split must be left out for {name}, which is a single split, got {split}.")
    for column in columns:
        if column not in found.column_names or getattr(found.features[column], "dtype", "") not in (
            "string",
            "large_string",
        ):
            raise ValueError(
                f"{name} must have a column {column!r} of strings, got {', '.join(found.column_names)}. Choose other "
                "columns with --text."
            )
    return _joined(found.select_columns(columns))


def _joined(rows: Any) -> Iterator[str]:
    for batch in rows.iter(ROWS_AT_ONCE):
        for cells in zip(*batch.values(), strict=True):
            yield " ".join(cell for cell in cells if cell)
