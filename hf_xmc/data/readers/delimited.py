"""Read CSV and TSV files from spreadsheets, pandas, databases and Annif, with all cells as text."""

from __future__ import annotations

import csv
import gzip
import logging
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from io import BufferedReader, RawIOBase, TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from hf_xmc.data.readers.formats import MAX_LINE, TextBuilder
from hf_xmc.data.readers.npz import MAX_RATIO

logger = logging.getLogger(__name__)

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
REPLACED = "\ufffd"  # what takes the place of bytes that are not in the encoding


def read_delimited(
    path: Path, report: Counter[str], encoding: str = "utf-8", errors: str = "strict"
) -> tuple[pa.Table, Callable[[int], str]]:
    """Return all columns of a CSV or TSV file, gzipped or not, and a function that returns the line of a row.

    The separator of a ``.csv`` file is a comma, semicolon or tab, whichever occurs most often in its header. A byte
    order mark, quotes, and line breaks within quotes are supported. Blank lines are skipped.

    Args:
        path: The file.
        report: Counts of corrections, to which this function adds.
        encoding: Encoding of the file. UTF-16 is recognized.
        errors: ``"replace"`` replaces bytes that are not in the encoding, and counts the cells that hold them.

    Raises:
        ValueError: if the file is empty or damaged, is not in the encoding, has a quote that is not closed, or a row
            has more or fewer cells than the header. The message names the line at which the row begins.
    """
    rows = DelimitedRows(path, report, encoding, errors)
    columns, lines = [TextBuilder() for _ in rows.names], array("q")
    replaced = 0
    for cells, line in rows:
        lines.append(line)
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
            replaced += errors == "replace" and REPLACED in cell
    if replaced:
        report[f"{path.name}: cells with bytes replaced"] += replaced
    table = pa.Table.from_arrays([column.done() for column in columns], names=rows.names)
    return table, lambda row: f"{path}:{lines[row]}"


def read_csv_rows(path: Path, report: Counter[str], errors: str = "strict") -> Iterator[tuple[dict[str, str], str]]:
    """Yield the cells of each row by column name, with the ``file:line`` at which the row begins.

    Raises:
        ValueError: if two columns have the same name, or :func:`read_delimited` would raise it.
    """
    rows = DelimitedRows(path, report, "utf-8", errors)
    names = rows.names
    if len(set(names)) < len(names):
        raise ValueError(f"{path}:{rows.line}: columns must have different names, got {', '.join(names)}.")
    for cells, line in rows:
        yield dict(zip(names, cells, strict=True)), f"{path}:{line}"


class DelimitedRows:
    """The rows of a CSV or TSV file, one at a time. Read as in :func:`read_delimited`.

    Iteration yields the cells of a row, and the line at which it begins.

    Args:
        path: The file.
        report: Counts of corrections, to which the iteration adds.
        encoding, errors: As in :func:`read_delimited`.
        stream: Bytes to read in place of the file, whose name is for messages only then.

    Attributes:
        names: Names of the columns.
        line: Line of the names.
        delimiter: Separator of the columns.

    Raises:
        ValueError: if :func:`read_delimited` would raise it; for a row, when it is read.
    """

    delimiter: str

    def __init__(
        self,
        path: Path,
        report: Counter[str],
        encoding: str = "utf-8",
        errors: str = "strict",
        stream: BinaryIO | None = None,
    ) -> None:
        self._path, self._stream = path, stream
        self._rows = self._read(report, encoding, errors)
        self.names, self.line = next(self._rows)

    def __iter__(self) -> Iterator[tuple[list[str], int]]:
        return self._rows

    def close(self) -> None:
        """Close the file, which happens by itself after the last row."""
        self._rows.close()

    def _read(self, report: Counter[str], encoding: str, errors: str) -> Generator[tuple[list[str], int]]:
        """Yield the names of the columns and then the cells of each row, with the line at which it begins."""
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # 128 KiB by default, less than a long text
        path, before, line, first, names = self._path, 0, 1, "", list[str]()
        try:
            with _opened(path) if self._stream is None else BufferedReader(cast(RawIOBase, self._stream)) as file:
                encoding = _encoding(file.peek(4), encoding, path, report)
                lines = _lines(path, TextIOWrapper(file, encoding, errors, newline=""))
                first, self.delimiter, before = _header(path, lines)
                reader = csv.reader(chain([first], lines), delimiter=self.delimiter, strict=True)
                line = before + 1
                for cells in reader:
                    if not names:
                        names = [cell.strip() for cell in cells]
                        if not any(names):
                            break
                        yield names, line
                    elif cells and len(cells) != len(names):
                        raise ValueError(
                            f"{path}:{line}: expected {len(names)} cells, got {len(cells)}. Put cells that contain "
                            f"{self.delimiter!r} or a line break in double quotes."
                        )
                    elif cells:
                        yield cells, line
                    line = before + reader.line_num + 1
        except LookupError:
            raise ValueError(f"`encoding` must be a name such as 'utf-8' or 'latin-1', got {encoding!r}.") from None
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: not valid CSV ({error}). Is the quote of a cell not closed?") from None
        except UnicodeDecodeError as error:
            if self._stream is not None:
                raise ValueError(f"{path}: not {encoding.removesuffix('-sig')} ({error.reason}).") from None
            raise ValueError(_not_encoded(path, encoding, error)) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged or truncated ({error}). Download it again.") from None
        if not any(names):
            raise ValueError(
                f"{path} must have the names of the columns in its first line, got {first[:80].rstrip()!r}."
            )


def _header(path: Path, lines: Iterator[str]) -> tuple[str, str, int]:
    """Return the line with the names of the columns, their separator, and the number of lines before."""
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    first, delimiter, before = next(lines, ""), usual, 0
    if len(first.rstrip("\r\n")) == 5 and first.startswith("sep="):  # as in files from Excel
        first, delimiter, before = next(lines, ""), first[4], 1
    elif usual == ",":
        delimiter = max(",;\t", key=first.count)
    if delimiter != usual:
        logger.info("%s: the columns are separated by %r.", path, delimiter)
    return first, delimiter, before


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case, without ``.gz``.

    >>> suffix_of(Path("books.CSV.gz"))
    '.csv'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _encoding(start: bytes, encoding: str, path: Path, report: Counter[str]) -> str:
    """Return the encoding of a file that begins with these bytes, without a byte order mark."""
    if start[:2] in UTF_16:
        return "utf-16"
    if encoding.lower() not in ("utf-8", "utf8"):
        return encoding
    if start.startswith(b"\xef\xbb\xbf"):
        report[f"{path.name}: byte order mark removed"] += 1
    return "utf-8-sig"


def _lines(path: Path, file: TextIOWrapper) -> Iterator[str]:
    limit = MAX_RATIO * path.stat().st_size + 2**20 if path.suffix.lower() == ".gz" else None
    size = 0
    for number, line in enumerate(file, start=1):
        size += len(line)
        if limit is not None and size > limit:
            raise ValueError(
                f"{path}:{number}: the file exceeds {MAX_RATIO} times its compressed size, so it is damaged or hostile."
            )
        if "\0" in line:
            raise ValueError(f"{path}:{number}: the line contains a NUL character, so the file is not text or damaged.")
        yield line


def _not_encoded(path: Path, encoding: str, error: UnicodeDecodeError) -> str:
    """Return a message that names the first line with bytes that are not in the encoding."""
    if encoding != "utf-8-sig":
        return f"{path}: bytes {error.object[error.start : error.end]!r} are not {encoding} ({error.reason})."
    with _opened(path) as file:
        places = ((number, _wrong_byte(line)) for number, line in enumerate(file, start=1))
        number, wrong = next(place for place in places if place[1] >= 0)
    return (
        f"{path}:{number}: byte {wrong} of the line is not UTF-8. Pass the encoding of the file, such as "
        f"`load_xmc({str(path)!r}, encoding='latin-1', ...)`, or `errors='replace'` to replace such bytes."
    )


def _wrong_byte(line: bytes) -> int:
    """Return the place of the first byte that is not UTF-8, or -1."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1
