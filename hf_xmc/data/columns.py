"""Read and check the columns of data sets: query texts, lists of label ids, and label texts.

All code that takes queries or labels reads them here and in :mod:`hf_xmc.data.positives`. So an invalid column gives
the same error everywhere, with its row and column, before any work starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

QUERY_COLUMNS = ("text", "label_ids", "label_scores")  # the last one is optional


class Positives(NamedTuple):
    """The positives of each query: ``label_ids[offsets[i]:offsets[i + 1]]`` for row ``i``."""

    offsets: np.ndarray  # (N + 1,) int64
    label_ids: np.ndarray
    scores: np.ndarray | None  # float32; None if the positives are not graded


def as_dataset(given: object, name: str, columns: str = "columns text and label_ids") -> Dataset:
    """Return a data set without its output format, so that rows are plain Python objects.

    Raises:
        ValueError: if it is not a ``Dataset``, or has a transform.
    """
    if not isinstance(given, Dataset):
        kind = type(given).__name__
        raise ValueError(f"{name} must be a Dataset with {columns}, got {kind}.{_how_to_make_one(given, name)}")
    if given.format["type"] == "custom":
        raise ValueError(
            f"{name} must not have a transform, because its rows cannot be checked before they are read. Apply it "
            "first: `dataset.map(transform, batched=True)`."
        )
    plain = given.format["type"] is None and given.format["columns"] == given.column_names
    return given if plain else given.with_format(None)


def _how_to_make_one(given: Any, name: str) -> str:
    package = type(given).__module__.partition(".")[0]
    splits = [key for key, part in given.items() if hasattr(part, "features")] if isinstance(given, Mapping) else []
    hints = [
        (given is None, "If there is no validation split, XMCData.carve_validation takes one from train."),
        (isinstance(given, IterableDataset), "Load it without `streaming=True`, or use `Dataset.from_generator`."),
        (splits, f"Give one of its splits, such as {name}[{next(iter(splits), None)!r}]."),
        (isinstance(given, Mapping), "`Dataset.from_dict` makes one."),
        (
            package in ("pandas", "polars"),
            f"`Dataset.from_{package}(frame)` makes one. For label names instead of label_ids, write "
            "`XMCData.from_pandas(frame, text=..., labels=...)`.",
        ),
        (isinstance(given, pa.Table), "`Dataset(table)` makes one."),
        (hasattr(given, "train") and hasattr(given, "labels"), "Give one of its splits, such as `data.train`."),
        (_are_strings(given) and name == "labels", 'Write `Dataset.from_dict({"text": names})`.'),
        (_are_strings(given), "For texts and label names, write `XMCData.from_lists(texts, labels)`."),
        (
            isinstance(given, str | PathLike),
            f"`load_xmc({str(given)!r}, text=..., labels=...)` reads a table, and "
            f"`Vocabulary.of({str(given)!r}).labels` the labels of a vocabulary.",
        ),
        (isinstance(given, list | tuple), "`Dataset.from_list(rows)` makes one."),
    ]
    return next((f" {hint}" for holds, hint in hints if holds), "")


def _are_strings(given: Any) -> bool:
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(one, str) for one in given)


def ragged(dataset: Dataset, where: str = "row ") -> Positives:
    """Return the positives of a data set without changing any value.

    Raises:
        ValueError: if a column is missing, does not contain lists of numbers, or has gaps, or if the lengths of
            ``label_ids`` and ``label_scores`` differ.
    """
    columns = [column for column in QUERY_COLUMNS[1:] if column in dataset.column_names]
    if "label_ids" not in columns:
        raise ValueError(f"there is no column label_ids, only {', '.join(dataset.column_names)}.")
    return _ragged(dataset.with_format("arrow").select_columns(columns)[:], where)


def texts_of(dataset: Dataset, where: str = "row ") -> pa.ChunkedArray:
    """Return the column ``text``.

    Raises:
        ValueError: if it is missing, does not hold strings, or has gaps.
    """
    if "text" not in dataset.column_names:
        raise ValueError(f"there is no column text, only {', '.join(dataset.column_names)}.")
    return _texts(dataset.with_format("arrow").select_columns("text")[:]["text"], where)


def rows_of(features: Sequence[Mapping[str, Any]], where: str = "batch, row ") -> tuple[list[str], Positives]:
    """Return the texts and positives of rows in memory, with the checks of a data set.

    >>> rows_of([{"text": "a sloop", "label_ids": [0, 1]}, {"text": "a cat", "label_ids": [5]}])
    (['a sloop', 'a cat'], Positives(offsets=array([0, 2, 3]), label_ids=array([0, 1, 5]), scores=None))
    """
    columns = {}
    for column in QUERY_COLUMNS[: 3 if features and "label_scores" in features[0] else 2]:
        for row, values in enumerate(features):
            if column not in values:
                raise ValueError(f"{where}{row}: there is no {column}, only {', '.join(values)}.")
        columns[column] = _column([values[column] for values in features], column, where)
    positives = _ragged(pa.table({name: columns[name] for name in columns if name != "text"}), where)
    for at in np.flatnonzero(positives.label_ids < 0)[:1]:
        row = row_of(positives.offsets, at)
        raise ValueError(f"{where}{row}: label_ids must be at least 0, got {positives.label_ids[at]}.")
    return _texts(pa.chunked_array([columns["text"]]), where).to_pylist(), positives


def label_texts_of(labels: Any, name: str = "labels") -> list[str]:
    """Return the texts of labels, given as a list of strings or as a data set with a column ``text``.

    Raises:
        ValueError: if the labels have an invalid type, a text is missing or not a string, or there are no labels.
    """
    if isinstance(labels, Dataset):
        texts: list[str] = texts_of(as_dataset(labels, name, "a column text"), f"{name}, row ").to_pylist()
    else:
        kind = "a list of label texts, or a Dataset, such as from Dataset.from_pandas or Dataset.from_dict"
        texts = strings_of(labels, kind, "label")
    if not texts:
        raise ValueError("`labels` must have at least one text, got none.")
    return texts


def strings_of(values: Any, expected: str, noun: str) -> list[str]:
    """Return texts as a list, or raise ``ValueError`` if they are not a sequence of strings."""
    check_is_list(expected, values)
    texts = list(values)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{noun} {number} must be a string, got a {type(text).__name__}.")
    return texts


def checked_labels(labels: Any) -> list[str] | Dataset:
    """Return labels for training: a data set unchanged, other labels as a list; errors as in :func:`label_texts_of`.

    A log line counts empty and repeated texts, because an encoder cannot tell such labels apart.
    """
    texts = label_texts_of(labels)
    if again := len(texts) - len(set(texts)):
        logger.warning("labels: %d texts are repeated. Labels with equal texts get equal scores.", again)
    if blank := sum(not text.strip() for text in texts):
        logger.warning("labels: %d texts are empty.", blank)
    return labels if isinstance(labels, Dataset) else texts


def check_is_list(expected: str, given: object) -> None:
    """Raise ``ValueError`` for a single text, a table, or anything else that is not a list.

    Iterating a text gives its letters, and iterating a table its column names, which would be read as texts.
    """
    if isinstance(given, PathLike) or (isinstance(given, str) and os.path.isfile(given)):
        raise ValueError(
            f"expected {expected}, got the path {str(given)!r}. `Vocabulary.of({str(given)!r}).labels` reads the "
            "labels of a file."
        )
    if isinstance(given, str):
        raise ValueError(f"expected {expected}, got the single text {given!r}. Put it in a list.")
    if isinstance(given, Mapping | set | frozenset) or hasattr(given, "columns") or not isinstance(given, Iterable):
        raise ValueError(f"expected {expected}, got a {type(given).__name__}.")


def _texts(texts: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if pa.types.is_null(texts.type) and not len(texts):
        texts = texts.cast(pa.string())
    if texts.null_count:
        raise ValueError(f"{where}{texts.is_null().index(True).as_py()}: no text.")
    if _name_of(texts.type) != "string":
        raise ValueError(f"{where}0: text must be a string, got {texts.type}.")
    return texts.cast(pa.string())


def _ragged(table: pa.Table, where: str) -> Positives:
    lengths, label_ids = _lists_of(table, "label_ids", where)
    offsets = np.append(0, lengths.cumsum()).astype(np.int64)
    if label_ids.null_count:
        at = label_ids.is_null().index(True).as_py()
        raise ValueError(f"{where}{row_of(offsets, at)}: a label id is missing.")
    scores = None
    if "label_scores" in table.column_names:
        score_lengths, values = _lists_of(table, "label_scores", where)
        for row in np.flatnonzero(score_lengths != lengths)[:1]:
            raise ValueError(
                f"{where}{row}: label_ids and label_scores must have the same length and order, got {lengths[row]} and "
                f"{score_lengths[row]} values."
            )
        scores = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return Positives(offsets, label_ids.to_numpy(zero_copy_only=False), scores)


def _lists_of(table: pa.Table, name: str, where: str) -> tuple[np.ndarray, pa.Array]:
    """Return the lengths of a column's lists, and the numbers in them."""
    lists, types = table[name].combine_chunks(), pa.types
    if lists.null_count:
        raise ValueError(f"{where}{lists.is_null().index(True).as_py()}: no {name}.")
    if types.is_null(lists.type):  # if there are no rows
        lists = lists.cast(pa.list_(pa.int64()))
    if not (types.is_list(lists.type) or types.is_large_list(lists.type) or types.is_fixed_size_list(lists.type)):
        raise ValueError(
            f"{where}0: {name} must be a list of numbers, got {_name_of(lists.type)}: {shown(lists[0].as_py())}. For a "
            "single label, write a list of one: `[label]`."
        )
    lengths, values = pc.list_value_length(lists).to_numpy(zero_copy_only=False), pc.list_flatten(lists)
    graded = types.is_floating(values.type) or types.is_decimal(values.type)
    fits = types.is_integer(values.type) or (graded and name == "label_scores")
    if len(values) and not fits:
        row = int(np.flatnonzero(lengths)[0])
        expected = "integers" if name == "label_ids" else "numbers"
        hint = _hint(values.type) if name == "label_ids" else ""
        got = shown(lists[row].as_py())
        raise ValueError(f"{where}{row}: {name} must be {expected}, got {_name_of(values.type)}: {got}.{hint}")
    return lengths, values if fits else pa.array([], pa.int64())


def _name_of(kind: pa.DataType) -> str:
    return "string" if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else str(kind)


def _hint(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return " If these are flags, one per label, `np.flatnonzero(row)` gives the label ids."
    if _name_of(kind) == "string":
        return (
            " A label id is the position of the label in the list of labels. For names or uids, write "
            "`XMCData.from_lists(texts, names, vocabulary=labels)`, whose `train` has label_ids. For digits, write "
            "`[[int(digits) for digits in row] for row in label_ids]`."
        )
    return " A label id is the position of the label in the list of labels, and a row is one flat list of them."


def _column(values: list[Any], name: str, where: str) -> pa.Array:
    """Return values of rows as an Arrow array, with arrays and tensors as lists."""
    values = [np.asarray(value).tolist() if hasattr(value, "__array__") else value for value in values]
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for row in range(len(values)):
            try:
                pa.array(values[: row + 1])
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{where}{row}: {name} is {shown(values[row])} ({error}).") from None
        raise


def row_of(offsets: np.ndarray, at: int) -> int:
    """Return the row of the value at this position."""
    return int(np.searchsorted(offsets, at, "right")) - 1


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
