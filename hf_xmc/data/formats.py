"""Readers of the file formats that extreme classification data comes in: text and label ids, or an error with a line.

Nothing of a file is used before all of it has been read, and nothing is dropped in silence: what is mended is counted
in ``notes``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_xmc.data.npz import MAX_RATIO, read_npz

MAX_LINE = 64 * 2**20  # bytes
MAX_BLANK = 1000  # blank lines at the end of a file
ROWS_A_BATCH = 10_000


@dataclass
class Rows:
    """Queries as read, before their label ids are checked: row ``i`` has ``label_ids[offsets[i]:offsets[i + 1]]``."""

    texts: pa.ChunkedArray
    offsets: np.ndarray
    label_ids: np.ndarray
    scores: np.ndarray | None
    where: Callable[[int], str]  # file and line of a row, for messages


def read_lines(path: Path, notes: Counter[str], errors: str = "strict") -> Iterator[tuple[str, str]]:
    r"""Each line of a text file, gzipped or not, with its ``file:line``. Lines end at ``\n`` and nowhere else.

    Raises:
        ValueError: if a line is not UTF-8 (unless ``errors="replace"``, which is counted), holds a NUL character or is
            longer than ``MAX_LINE``; or if a gzip file is damaged, truncated, or larger than ``MAX_RATIO`` allows.
    """
    limit = MAX_RATIO * path.stat().st_size + 2**20
    number, size = 0, 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path}:{number}"
                size += len(line)
                if len(line) > MAX_LINE or size > limit:
                    raise ValueError(
                        f"{where}: {'a line' if len(line) > MAX_LINE else 'the file'} grows beyond "
                        f"{MAX_LINE >> 20} MiB a line or {MAX_RATIO} times its compressed size: it is damaged or "
                        "hostile."
                    )
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                    notes[f"{path.name}: byte order mark removed"] += 1
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    if errors == "strict":
                        raise ValueError(
                            f"{where}: byte {error.start} is not UTF-8. Convert the file, or pass errors='replace' to "
                            "replace such bytes and have them counted."
                        ) from None
                    text = line.decode(errors="replace")
                    notes[f"{path.name}: lines with bytes replaced"] += 1
                if "\0" in text:
                    raise ValueError(
                        f"{where}: the line contains a NUL character: the file is not text, or is damaged."
                    )
                yield text.removesuffix("\n"), where
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated after line {number} ({error}): download it again.") from None


def read_json_rows(path: Path, notes: Counter[str], errors: str = "strict") -> Rows:
    """``trn.json.gz`` or ``tst.json.gz`` of the Extreme Classification Repository."""
    texts = _Texts()
    offsets, label_ids, scores = array("q", [0]), array("q"), array("f")
    for record, where in objects_of(read_lines(path, notes, errors)):
        ids = list_of(record, "target_ind", int, where)
        graded = list_of(record, "target_rel", (int, float), where) if "target_rel" in record else [1.0] * len(ids)
        if len(ids) != len(graded):
            raise ValueError(
                f"{where}: {len(ids)} numbers in target_ind and {len(graded)} in target_rel; expected as many."
            )
        texts.append(text_of(record, where))
        try:
            label_ids.extend(ids)
        except OverflowError:
            raise ValueError(f"{where}: a label id does not fit 64 bits.") from None
        scores.extend(map(float, graded))
        offsets.append(len(label_ids))
    return Rows(
        texts.done(),
        np.array(offsets),
        np.array(label_ids, dtype=np.int64),
        np.array(scores, dtype=np.float32),
        lambda row: f"{path}:{row + 1}",
    )


def read_json_labels(path: Path, notes: Counter[str], errors: str = "strict") -> tuple[pa.ChunkedArray, list[str]]:
    """``lbl.json.gz``: label texts, and the labels' own ids (``uid``)."""
    texts, ids = _Texts(), []
    named: bool | None = None  # whether the first label has a uid
    for number, (record, where) in enumerate(objects_of(read_lines(path, notes, errors))):
        texts.append(text_of(record, where))
        named = "uid" in record if named is None else named
        if ("uid" in record) != named:
            found = "no uid" if named else "a uid"
            raise ValueError(f"{where}: {found}, unlike the lines before. Give every label a uid, or none.")
        uid = record.get("uid", number)
        if isinstance(uid, bool) or not isinstance(uid, str | int | float):
            raise ValueError(f"{where}: uid is {str(uid)[:80]}; expected a string.")
        ids.append(str(uid))
    return texts.done(), ids


def read_text_rows(
    path: Path, relevance: Path, label_file: Path, num_labels: int, notes: Counter[str], errors: str = "strict"
) -> Rows:
    """Read the layout of the paper's reference code: one text per line, and its labels in a row of a scipy ``.npz``.

    Raises:
        ValueError: if the matrix does not have one row per text and one column per label of ``label_file``.
    """
    texts = read_texts(path, notes, errors)
    matrix = read_npz(relevance)
    for lines, file, size, axis in (
        (len(texts), path, matrix.shape[0], "rows"),
        (num_labels, label_file, matrix.shape[1], "columns"),
    ):
        if lines > size:
            cause = (
                f"Does a text of {file} contain a line break, does the file end with an empty line, or is one of the "
                "files from another data set?"
            )
        else:
            cause = f"Is {file} cut short, or one of the files from another data set?"
        if lines != size:
            raise ValueError(f"{file} has {lines} lines and {relevance} {size} {axis}; expected as many. {cause}")
    return Rows(
        texts, matrix.indptr, matrix.indices, matrix.data.astype(np.float32), lambda row: f"{relevance}, row {row}"
    )


def read_texts(path: Path, notes: Counter[str], errors: str = "strict") -> pa.ChunkedArray:
    texts = _Texts()
    for line, _ in read_lines(path, notes, errors):
        text = line.removesuffix("\r")
        if text != line:
            notes[f"{path.name}: carriage returns removed from ends of lines"] += 1
        texts.append(text)
    return texts.done()


def read_filter_pairs(path: Path, num_rows: int, num_labels: int, notes: Counter[str]) -> np.ndarray:
    """``filter_labels_*.txt``: ``(M, 2)`` pairs (row, label), a pair a line; pairs named again are counted."""
    pairs = array("q")
    for line, where in read_lines(path, notes):
        fields = line.split()
        if not fields:
            continue
        try:
            row, label = map(int, fields)
        except ValueError:
            raise ValueError(f"{where}: expected two numbers, row and label, got {line[:80]!r}.") from None
        if not (0 <= row < num_rows and 0 <= label < num_labels):
            raise ValueError(
                f"{where}: row {row}, label {label}, but there are {num_rows} rows and {num_labels} labels: is it the "
                "file of this split?"
            )
        pairs.extend((row, label))
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    unique = np.unique(table, axis=0)
    if len(unique) < len(table):
        notes[f"{path.name}: pairs named again"] += len(table) - len(unique)
    return unique


def text_of(record: dict[str, Any], where: str) -> str:
    """``title: content``, or whichever is not empty."""
    parts = []
    for key in ("title", "content"):
        part = record.get(key, "")
        if not isinstance(part, str):
            raise ValueError(f"{where}: {key} is {part!r}; expected text.")
        if "\0" in part:
            raise ValueError(f"{where}: {key} contains a NUL character.")
        parts.append(part)
    if "title" not in record and "content" not in record:
        raise ValueError(f"{where}: neither title nor content; the keys are {sorted(record)}.")
    return ": ".join(part for part in parts if part)


def objects_of(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the JSON object of each line, with its place. A few blank lines may stand at the end of a file."""
    first_blank, num_blank = "", 0
    for line, where in lines:
        if not line.strip():
            first_blank, num_blank = first_blank or where, num_blank + 1
            if num_blank > MAX_BLANK:  # of a file that swells when it is decompressed, nobody waits for the last one
                raise ValueError(f"{first_blank}: not valid JSON (followed by more than {MAX_BLANK} blank lines).")
        elif num_blank:
            raise ValueError(f"{first_blank}: not valid JSON (a blank line before others).")
        else:
            yield object_of(parse_json(line, where), where), where


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise ValueError(f"{where}: not valid JSON ({error}).") from None


def object_of(value: object, where: str) -> dict[str, Any]:
    """Return a JSON value that is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object in braces, got {json.dumps(value):.80}.")
    return value


def list_of(record: dict[str, Any], key: str, types: Any, where: str) -> list[Any]:
    """Return the list of numbers under a key of a JSON object."""
    values = record.get(key)
    if not isinstance(values, list) or not all(isinstance(v, types) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{where}: {key} is {str(values)[:80]}; expected a list of numbers.")
    return values


class _Texts:
    """Strings gathered into Arrow a batch at a time: Python strings of millions of rows would take far more."""

    def __init__(self) -> None:
        self.batches: list[pa.Array] = []
        self.batch: list[str] = []

    def append(self, text: str) -> None:
        self.batch.append(text)
        if len(self.batch) == ROWS_A_BATCH:
            self.flush()

    def flush(self) -> None:
        try:
            self.batches.append(pa.array(self.batch, pa.string()))
        except UnicodeEncodeError:
            raise ValueError(
                f"rows {len(self.batches) * ROWS_A_BATCH} and following: a text holds half of a surrogate pair, which "
                "is no character."
            ) from None
        self.batch = []

    def done(self) -> pa.ChunkedArray:
        self.flush()
        return pa.chunked_array(self.batches, pa.string())
