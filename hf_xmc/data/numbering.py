"""Check that numbers in a data set refer to rows of its tables: ``label_ids``, ``uid`` and filter pairs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

DIGITS = re.compile("[0-9]{1,18}")


def check_unique_uids(labels: Dataset, where: Callable[[int], str]) -> None:
    """Raise ``ValueError`` if two rows have the same ``uid``; ``where`` returns the name of a row."""
    if "uid" not in labels.column_names:
        return
    label_ids = labels.with_format("arrow").select_columns("uid")[:]["uid"]
    if pc.count_distinct(label_ids, mode="all").as_py() == len(label_ids):
        return
    first: dict[object, int] = {}
    for row, uid in enumerate(label_ids.to_pylist()):
        if first.setdefault(uid, row) != row:
            raise ValueError(
                f"{where(row)}: uid {uid!r} is repeated from {where(first[uid])}, but each label has one "
                "row. To give a label several texts, use a table labels.jsonl or labels.parquet."
            )


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column holds numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def check_numbering(uid: pa.ChunkedArray, used: np.ndarray, where: str) -> None:
    """Raise if ``label_ids`` may hold values of the column ``uid`` instead of row numbers.

    A numeric column that is not 0 to L - 1 is always refused. Digits written as text, such as EuroVoc's ``"2356"``, are
    refused only if every number in ``label_ids`` is one of them, so that both readings are possible.

    Args:
        uid: ``(L,)`` column of the label table, as read from its file.
        used: Numbers in ``label_ids`` of all splits, in any order.
        where: Name of the label table.

    Raises:
        ValueError: if the numbers may be values of ``uid``. The message says how to write each meaning.
    """
    given = uid.to_pylist()
    values = distinct = list(dict.fromkeys(given))  # several rows of one label are its texts
    if not is_number(uid.type):
        if not all(
            isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 for value in values
        ):
            return
        values = [int(value) for value in values]
        used = used if set(np.unique(used).tolist()) <= set(values) else used[:0]
    if not len(used) or values == list(range(len(values))):
        return
    number = next(number for number, value in enumerate(values) if value != number)
    start = ", counted from 1" if values == list(range(1, len(values) + 1)) else ""
    several = len(given) > len(values)
    place = "number of the label in the order in which they first occur" if several else "row number"
    raise ValueError(
        f"{where}, row {given.index(distinct[number])}: uid is {values[number]}, and the numbers of uid are "
        f"not the {'label' if several else 'row'} numbers 0 to {len(values) - 1}{start}. A whole number in label_ids "
        f"is read as the {place}, but it may be meant as a value of uid. If it is, write the {place} instead, "
        f"counted from 0. If not, {'' if several else 'leave uid out, or '}write uid as text with a letter, "
        f'such as "L{values[number]}". Or write the uids as text in a column labels, instead of label_ids.'
    )


def check_filter_pairs(pairs: np.ndarray, num_rows: int, num_labels: int, where: str) -> None:
    """Raise if filter pairs are out of range for a split and its labels.

    Args:
        pairs: ``(M, 2)`` whole numbers, row and label.
        num_rows: Number of queries in the split.
        num_labels: Number of labels.
        where: Name of the pairs.

    Raises:
        ValueError: if ``pairs`` has another shape or type, or names a row or a label that does not exist.
    """
    if not pairs.size:
        return
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise ValueError(
            f"{where} must be whole numbers of shape (M, 2), row and label, got {pairs.dtype} of shape {pairs.shape}."
        )
    for row, label in pairs[((pairs < 0) | (pairs >= [num_rows, num_labels])).any(1)][:1]:
        raise ValueError(
            f"{where} has row {row}, label {label}, but there are {num_rows} rows and {num_labels} labels. Do the "
            "pairs belong to this split?"
        )
