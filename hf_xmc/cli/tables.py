"""Read and write the CSV tables of ``hf-xmc predict``."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

PREDICTED = ("predicted_uids", "predicted_labels", "predicted_scores")


class TableReader:
    """The rows of a table, one at a time.

    Args:
        path: CSV or TSV file to read, gzipped or not; ``None`` for standard input.
        columns: Text columns.

    Attributes:
        header: Names of the columns.
        delimiter: Tab in a ``.tsv`` file; otherwise comma, semicolon or tab, whichever occurs most often in the header.

    Raises:
        ValueError: if a column does not exist or occurs twice, the table has a column of the predictions, or
            :class:`hf_xmc.data.readers.delimited.DelimitedRows` raises it.
    """

    def __init__(self, path: Path | None, columns: Sequence[str]) -> None:
        from hf_xmc.data.readers.delimited import DelimitedRows

        name, stream = (Path("standard input"), sys.stdin.buffer) if path is None else (path, None)
        self._rows = DelimitedRows(name, Counter(), stream=stream)
        self.header, self.delimiter = self._rows.names, self._rows.delimiter
        for column in columns:
            if self.header.count(column) != 1:
                found = ", ".join(self.header)
                raise ValueError(
                    f"{name} must have one column {column!r}, got {found}. Choose other columns with --text."
                )
        if taken := sorted(set(PREDICTED) & set(self.header)):
            raise ValueError(f"{name} already has the columns {', '.join(taken)}. Rename or remove them.")
        self._places = [self.header.index(column) for column in columns]

    def __iter__(self) -> Iterator[list[str]]:
        return (cells for cells, _ in self._rows)

    def text(self, row: Sequence[str]) -> str:
        """Return the text of a row: the non-empty cells of its text columns, joined by spaces."""
        return " ".join(cell for place in self._places if (cell := row[place]))


class TableLines:
    """The lines of a table with the columns of another one, and the predictions as further columns.

    Args:
        table: The other table.
        separator: Separator of the labels of a text.

    Attributes:
        header: The first line.
    """

    def __init__(self, table: TableReader, separator: str) -> None:
        self._separator, self._delimiter = separator, table.delimiter
        self.header = self._line([*table.header, *PREDICTED])

    def of(self, row: Sequence[str], labels: Sequence[dict[str, Any]]) -> str:
        """Return the line of a row and its labels, best first."""
        cells = [[str(label[name]) for label in labels] for name in ("uid", "text")]
        cells.append([f"{label['score']:.6g}" for label in labels])
        return self._line([*row, *(self._separator.join(cell) for cell in cells)])

    def _line(self, cells: Sequence[str]) -> str:
        text = StringIO(newline="")
        csv.writer(text, delimiter=self._delimiter, lineterminator="\n").writerow(cells)
        return text.getvalue()


def check_separator(separator: str, labels: Sequence[str]) -> None:
    """Raise if the uid or the text of a label contains the separator of labels."""
    if wrong := next((label for label in labels if separator in label), None):
        raise ValueError(f"--separator must not occur in a label, got {separator!r}, which is in {wrong!r}. Try '|'.")
