"""Read users' tables: CSV, TSV and JSON lines, gzipped or not, and parquet. All cells of CSV and TSV files are text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from hf_xmc.data.named import NamedRows
from hf_xmc.data.readers.delimited import read_delimited, suffix_of
from hf_xmc.data.readers.formats import objects_of, read_lines
from hf_xmc.data.readers.user_columns import Chosen, choose, column_of, named_rows

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FILE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")


class TableChoice(NamedTuple):
    """The columns of a table to read, and the encoding of the file."""

    text: str | Sequence[str] | None = None
    labels: str | Sequence[str] | None = None
    separator: str | None = None
    encoding: str = "utf-8"
    errors: str = "strict"


def read_user_table(path: Path, choice: TableChoice, report: Counter[str]) -> tuple[NamedRows, Chosen]:
    """Return the queries in a file, and the columns from which they were read.

    Raises:
        ValueError: if the file cannot be read, a column does not exist, or a cell is invalid. The message names the
            line.
    """
    call = f"load_xmc({str(path)!r}"
    kind = suffix_of(path)
    if kind not in SUFFIXES or path.name.lower().endswith(".parquet.gz"):
        raise ValueError(
            f"{path} must be a table in one of these formats: {', '.join(FILE_SUFFIXES)}. Save a spreadsheet as CSV; "
            "for a data set in several files, pass the folder."
        )
    if kind not in (".csv", ".tsv") and choice.encoding != "utf-8":
        raise ValueError(
            f"`encoding` must be 'utf-8', got {choice.encoding!r}, because {path} is neither a CSV nor a TSV table."
        )
    if kind in (".csv", ".tsv"):
        table, place = read_delimited(path, report, choice.encoding, choice.errors)
        columns: Sequence[str] = table.column_names
    elif kind == ".jsonl":
        records = list(objects_of(read_lines(path, report, choice.errors)))
        columns = list(dict.fromkeys(key for record, _ in records[:1000] for key in record))
        place = [where for _, where in records].__getitem__
    else:
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable table ({error}).") from None
        columns, place = file.schema_arrow.names, (f"{path}, row " + "{}").format
    chosen = choose(columns, choice.text, choice.labels, call, str(path))._replace(separator=choice.separator)
    if kind == ".parquet":
        with file:
            table = file.read(columns=chosen.names())

    def read(name: str) -> pa.ChunkedArray:
        return column_of([record.get(name) for record, _ in records], name, place) if kind == ".jsonl" else table[name]

    return named_rows(read, chosen, place), chosen
