"""Layouts with one text per line, and a matrix of the labels of each text: PECOS, the Repository, the paper's code."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hf_xmc.data.assembly import assemble, label_table
from hf_xmc.data.dataset import XMCData
from hf_xmc.data.prepared import SPLITS
from hf_xmc.data.readers.formats import Rows, read_filter_pairs, read_lines, read_texts
from hf_xmc.data.readers.npz import read_npz

SHORT = {"train": "trn", "test": "tst"}
FILTERS = ("filter_labels_{split}.txt", "{short}_filter_labels.txt")


@dataclass(frozen=True)
class MatrixLayout:
    """File names of a layout; ``{}`` stands for ``trn`` or ``tst``.

    Attributes:
        labels: Possible names of the file of label texts.
        texts: Name of the file of texts of a split.
        relevance: Name of the matrix of a split.
    """

    labels: tuple[str, ...]
    texts: str
    relevance: str

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the files that identify a folder with this layout."""
        return (*self.labels, self.texts.format("trn"))

    def load(self, folder: Path, errors: str) -> XMCData:
        """Load the data set in a folder.

        Raises:
            ValueError: if a file is missing, or the files do not match.
        """
        load_report: Counter[str] = Counter()
        label_file = only(folder, self.labels)
        if label_file is None:
            found = next(name for name in (self.texts, self.relevance) if (folder / name.format("trn")).exists())
            raise ValueError(
                f"{folder} has {found.format('trn')}, but {' or '.join(self.labels)} is missing, a file with the text "
                "of one label per line."
            )
        texts = read_texts(label_file, load_report, errors)
        labels = label_table(texts, range(len(texts)), str(folder), load_report)
        splits = {}
        for split, short in SHORT.items():
            text_file, relevance = folder / self.texts.format(short), folder / self.relevance.format(short)
            for one, other in ((text_file, relevance), (relevance, text_file)):
                if one.exists() and not other.exists():
                    raise ValueError(f"{one} exists, but {other} is missing.")
            if text_file.exists():
                splits[split] = read_matrix_rows(text_file, relevance, label_file, len(texts), load_report, errors)
        if "train" not in splits:
            raise ValueError(
                f"{folder} has {label_file.relative_to(folder)}, but {self.texts.format('trn')} is missing."
            )
        pairs = text_filters(folder, splits, len(labels), load_report)
        return XMCData.of_parts(assemble(labels, splits, pairs, load_report))


REFERENCE = MatrixLayout(("raw/Y.txt",), "raw/{}_X.txt", "Y.{}.npz")
PECOS = MatrixLayout(("output-items.txt", "Z.all.txt"), "X.{}.txt", "Y.{}.npz")
REPOSITORY = MatrixLayout(("Y.txt",), "{}_X.txt", "{}_X_Y.txt")


class Relevance(NamedTuple):
    """A sparse matrix as read from its file: row ``i`` has ``label_ids[offsets[i]:offsets[i + 1]]``."""

    shape: tuple[int, int]
    offsets: np.ndarray
    label_ids: np.ndarray
    scores: np.ndarray
    where: Callable[[int], str]  # place of a row, for messages


def read_matrix_rows(
    path: Path, relevance: Path, label_file: Path, num_labels: int, load_report: Counter[str], errors: str = "strict"
) -> Rows:
    """Read a file with one text per line, and the labels of each text from the rows of a matrix.

    Raises:
        ValueError: if the matrix does not have one row per text and one column per label of ``label_file``.
    """
    texts = read_texts(path, load_report, errors)
    matrix = _read_npz_relevance(relevance) if relevance.suffix == ".npz" else _read_text_relevance(relevance)
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
            cause = f"Is {file} truncated, or is one of the files from another data set?"
        if lines != size:
            raise ValueError(
                f"{file} must have one line for each of the {size} {axis} of {relevance}, got {lines} lines. {cause}"
            )
    return Rows(texts, matrix.offsets, matrix.label_ids, matrix.scores, matrix.where)


def _read_npz_relevance(path: Path) -> Relevance:
    matrix = read_npz(path)
    scores = matrix.data.astype(np.float32)
    return Relevance(matrix.shape, matrix.indptr, matrix.indices, scores, lambda row: f"{path}, row {row}")


def _read_text_relevance(path: Path) -> Relevance:
    """Read a matrix in the Repository's format: a line `rows labels`, then a line `label:score label:score` per row.

    Raises:
        ValueError: if a line is invalid, or the number of lines is not the number of rows.
    """
    lines = read_lines(path, Counter())
    offsets, label_ids, scores = array("q", [0]), array("q"), array("f")
    first, where = next(lines, ("", f"{path}:1"))
    fields = first.split()
    if len(fields) != 2 or not all(field.isascii() and field.isdigit() and len(field) < 19 for field in fields):
        raise ValueError(f"{where}: expected the numbers of rows and of labels, got {first[:80]!r}.")
    num_rows, num_labels = map(int, fields)
    for line, where in lines:
        for field in line.split():
            label, _, score = field.partition(":")
            try:
                label_ids.append(int(label))
                scores.append(float(score))
            except (ValueError, OverflowError):
                raise ValueError(f"{where}: expected `label:score`, got {field[:80]!r}.") from None
        offsets.append(len(label_ids))
    if len(offsets) - 1 != num_rows:
        raise ValueError(
            f"{path}:1: the first line says {num_rows} rows, but {len(offsets) - 1} lines follow. Is the file "
            "truncated?"
        )
    return Relevance(
        (num_rows, num_labels),
        np.array(offsets),
        np.array(label_ids, dtype=np.int64),
        np.array(scores, dtype=np.float32),
        lambda row: f"{path}:{row + 2}",
    )


def text_filters(
    folder: Path, splits: dict[str, Rows], num_labels: int, load_report: Counter[str]
) -> dict[str, np.ndarray]:
    """Read the files of filter pairs next to the texts. A missing split has no rows.

    Raises:
        ValueError: if a split has two files of pairs, or a pair is out of range.
    """
    return {
        split: read_filter_pairs(path, len(splits[split].texts) if split in splits else 0, num_labels, load_report)
        for split in SPLITS
        if (path := only(folder, [name.format(split=split, short=SHORT.get(split, split)) for name in FILTERS]))
    }


def only(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the file of a folder with one of these names, if it exists.

    Raises:
        ValueError: if there are two such files, which may differ.
    """
    found = [path for name in names if (path := folder / name).exists()]
    if len(found) > 1:
        raise ValueError(
            f"{found[0]} and {found[1]} are the same table, and only one of them would be read. Remove the other one."
        )
    return found[0] if found else None
