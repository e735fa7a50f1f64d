"""Readers of the file formats of extreme classification. Errors name file and line.

A file is used only after all of it has been read. Corrections are counted in ``load_report``.
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

from hf_xmc.data.readers.npz import MAX_RATIO

MAX_LINE = 64 * 2**20  # bytes
MAX_BLANK = 1000  # blank lines at the end of a file
ROWS_A_BATCH = 10_000


@dataclass
class Rows:
    """Queries with unchecked label ids: row ``i`` has ``label_ids[offsets[i]:offsets[i + 1]]``."""

    texts: pa.ChunkedArray
    offsets: np.ndarray
    label_ids: np.ndarray
    scores: np.ndarray | None
    where: Callable[[int], str]  # file and line of a row, for messages


def read_lines(path: Path, load_report: Counter[str], errors: str = "strict") -> Iterator[tuple[str, str]]:
    r"""Yield each line of a text file, gzipped or not, with its ``file:line``. Only ``\n`` ends a line.

    Raises:
        ValueError: if a line is not UTF-8 (unless ``errors="replace"``, which is counted), contains a NUL character or
            is longer than ``MAX_LINE``; or if a gzip file is damaged, truncated, or larger than ``MAX_RATIO`` allows.
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
                        f"{where}: {'a line' if len(line) > MAX_LINE else 'the file'} exceeds "
                        f"{MAX_LINE >> 20} MiB per line or {MAX_RATIO} times its compressed size, so it is damaged or "
                        "hostile."
                    )
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                    load_report[f"{path.name}: byte order mark removed"] += 1
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    if errors == "strict":
                        raise ValueError(
                            f"{where}: byte {error.start} is not UTF-8. Convert the file, or pass errors='replace' to "
                            "replace such bytes and have them counted."
                        ) from None
                    text = line.decode(errors="replace")
                    load_report[f"{path.name}: lines with bytes replaced"] += 1
                if "\0" in text:
                    raise ValueError(
                        f"{where}: the line contains a NUL character, so the file is not text or is damaged."
                    )
                yield text.removesuffix("\n"), where
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated after line {number} ({error}). Download it again.") from None


def read_json_rows(path: Path, load_report: Counter[str], errors: str = "strict") -> Rows:
    """Read ``trn.json.gz`` or ``tst.json.gz`` of the Extreme Classification Repository."""
    texts = TextBuilder()
    offsets, label_ids, scores = array("q", [0]), array("q"), array("f")
    for record, where in objects_of(read_lines(path, load_report, errors)):
        ids = list_of(record, "target_ind", int, where)
        graded = list_of(record, "target_rel", (int, float), where) if "target_rel" in record else [1.0] * len(ids)
        if len(ids) != len(graded):
            raise ValueError(
                f"{where}: target_ind and target_rel must have the same length, got {len(ids)} and {len(graded)}."
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


def read_json_labels(
    path: Path, load_report: Counter[str], errors: str = "strict"
) -> tuple[pa.ChunkedArray, list[str]]:
    """Read ``lbl.json.gz``. Return label texts and uids."""
    texts, ids = TextBuilder(), []
    named: bool | None = None  # whether the first label has a uid
    for number, (record, where) in enumerate(objects_of(read_lines(path, load_report, errors))):
        texts.append(text_of(record, where))
        named = "uid" in record if named is None else named
        if ("uid" in record) != named:
            found = "no uid" if named else "a uid"
            raise ValueError(f"{where}: {found}, unlike the lines before. Give a uid to all labels or to none.")
        uid = record.get("uid", number)
        if isinstance(uid, bool) or not isinstance(uid, str | int | float):
            raise ValueError(f"{where}: uid must be a string, got {str(uid)[:80]}.")
        ids.append(str(uid))
    return texts.done(), ids


def read_texts(path: Path, load_report: Counter[str], errors: str = "strict") -> pa.ChunkedArray:
    texts = TextBuilder()
    for line, _ in read_lines(path, load_report, errors):
        text = line.removesuffix("\r")
        if text != line:
            load_report[f"{path.name}: carriage returns removed from ends of lines"] += 1
        texts.append(text)
    return texts.done()


def read_filter_pairs(path: Path, num_rows: int, num_labels: int, load_report: Counter[str]) -> np.ndarray:
    """Read ``filter_labels_*.txt``, one pair per line, as ``(M, 2)`` (row, label). Repeated pairs are counted."""
    pairs = array("q")
    for line, where in read_lines(path, load_report):
        fields = line.split()
        if not fields:
            continue
        try:
            row, label = map(int, fields)
        except ValueError:
            raise ValueError(f"{where}: expected two numbers, row and label, got {line[:80]!r}.") from None
        if not (0 <= row < num_rows and 0 <= label < num_labels):
            raise ValueError(
                f"{where}: row {row}, label {label}, but there are {num_rows} rows and {num_labels} labels. Is it the "
                "file of this split?"
            )
        pairs.extend((row, label))
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    unique = np.unique(table, axis=0)
    if len(unique) < len(table):
        load_report[f"{path.name}: repeated pairs"] += len(table) - len(unique)
    return unique


def text_of(record: dict[str, Any], where: str) -> str:
    """Return ``title: content``, or only the part that is not empty."""
    parts = []
    for key in ("title", "content"):
        part = record.get(key, "")
        if not isinstance(part, str):
            raise ValueError(f"{where}: {key} must be a string, got {part!r}.")
        if "\0" in part:
            raise ValueError(f"{where}: {key} contains a NUL character.")
        parts.append(part)
    if "title" not in record and "content" not in record:
        raise ValueError(f"{where}: expected a title or content, got the keys {sorted(record)}.")
    return ": ".join(part for part in parts if part)


def objects_of(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the JSON object of each line, with its position. A file may end with a few blank lines."""
    first_blank, num_blank = "", 0
    for line, where in lines:
        if not line.strip():
            first_blank, num_blank = first_blank or where, num_blank + 1
            if num_blank > MAX_BLANK:  # do not read a decompression bomb to its end
                raise ValueError(f"{first_blank}: not valid JSON (followed by more than {MAX_BLANK} blank lines).")
        elif num_blank:
            raise ValueError(f"{first_blank}: not valid JSON (a blank line before others).")
        else:
            yield object_of(parse_json(line, where), where), where


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON string."""
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
        raise ValueError(f"{where}: {key} must be a list of numbers, got {str(values)[:80]}.")
    return values


class TextBuilder:
    """Collect strings in Arrow batches, because Python strings of millions of rows take much more memory."""

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
                f"rows {len(self.batches) * ROWS_A_BATCH} and following: a text contains half of a surrogate pair, "
                "which is not a character."
            ) from None
        self.batch = []

    def done(self) -> pa.ChunkedArray:
        self.flush()
        return pa.chunked_array(self.batches, pa.string())
