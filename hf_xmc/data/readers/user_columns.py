"""Columns of users' tables: texts in one or several columns, and labels as lists, strings or one column per label."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_xmc.data.columns import shown
from hf_xmc.data.named import HINT, NamedRows
from hf_xmc.data.readers.vocabularies import READERS

logger = logging.getLogger(__name__)

SEPARATORS = (";", "|", "\t", ",")
FLAGS = {"1": True, "1.0": True, "true": True, "x": True, "0": False, "0.0": False, "false": False, "": False}


class Chosen(NamedTuple):
    """The columns of a table with texts and labels."""

    text: tuple[str, ...]
    labels: str | tuple[str, ...]  # several columns contain flags, one column per label name
    separator: str | None = None  # of the names in a cell; "" if a cell is one name
    scores: str | None = None

    def names(self) -> list[str]:
        """Return all columns to read."""
        labels = (self.labels,) if isinstance(self.labels, str) else self.labels
        return [*self.text, *labels, *([self.scores] if self.scores else [])]


def choose(
    columns: Iterable[Any], text: str | Sequence[str] | None, labels: str | Sequence[str] | None, call: str, name: str
) -> Chosen:
    """Return the columns to read. The defaults are ``text`` and ``labels``, which a log line then says.

    Args:
        columns: All columns of the table.
        text: Column of the text, or several whose texts are joined.
        labels: Column of the labels, or several with one flag per row.
        call: Beginning of the call that messages show, such as ``load_xmc('books.csv'``.
        name: Name of the table in messages.

    Raises:
        ValueError: if a column, given or default, does not exist. The message lists the columns and the line to write.
    """
    known = list(columns)
    listed = ", ".join(map(str, known)) or "none"
    for argument, given in (("text", text), ("labels", labels)):
        if given is None and argument not in known:
            others = {"text": text or known[0], "labels": labels or known[-1]} if known else {}
            line = ", ".join(f"{key}={value!r}" for key, value in others.items())
            raise ValueError(
                f"{name} has no column {argument}, and `{argument}` is not given. Its columns are {listed}. Choose the "
                f"columns to read, such as `{call}, {line})`."
            )
    if guessed := [argument for argument, given in (("text", text), ("labels", labels)) if given is None]:
        logger.info("%s: reading %s from the columns with these names.", name, " and ".join(guessed))
    texts = (text,) if isinstance(text, str) else tuple(text if text is not None else ("text",))
    named = labels if isinstance(labels, str) else "labels" if labels is None else tuple(labels)
    for argument, wanted in (("text", texts), ("labels", (named,) if isinstance(named, str) else named)):
        if not wanted:
            raise ValueError(f"`{argument}` must name at least one column, got none. The columns are {listed}.")
        for column in wanted:
            if known.count(column) != 1:
                fault = "two columns" if column in known else "no column"
                is_file = argument == "labels" and Path(str(column)).suffix in READERS
                close = get_close_matches(str(column), [str(name) for name in known], 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                if is_file:
                    hint = f" If it is the file of a vocabulary, write `vocabulary={column!r}`."
                elif isinstance(column, str) and len(parts := column.split(",")) > 1 and {*parts} <= {*known}:
                    hint = f" If they are several, write `{argument}={parts!r}`."
                raise ValueError(
                    f"{name} has {fault} {column!r}, named in `{argument}`; its columns are {listed}.{hint}"
                )
    return Chosen(texts, named, scores="label_scores" if "label_scores" in known else None)


def named_rows(read: Callable[[str], pa.ChunkedArray], chosen: Chosen, where: Callable[[int], str]) -> NamedRows:
    """Return the queries in the columns of a table.

    Args:
        read: Function that returns the column of a name.
        chosen: Columns to read.
        where: Function that returns the position of a row for messages.

    Raises:
        ValueError: if a cell is invalid. The message names its row and column.
    """
    joined = _text(read(chosen.text[0]), chosen.text[0], where)
    for column in chosen.text[1:]:
        joined = _joined(joined, _text(read(column), column, where))
    if not isinstance(chosen.labels, str):
        if chosen.separator is not None:
            raise ValueError("`separator` must be None for several columns of labels, whose cells are flags.")
        flags = np.stack([_flags(read(column), column, where) for column in chosen.labels], axis=1)
        rows, columns = np.nonzero(flags)
        offsets = np.append(0, np.bincount(rows, minlength=len(flags)).cumsum())
        names = pa.array(chosen.labels, pa.string()).take(pa.array(columns))
        return NamedRows(joined, pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names), where)
    labels = label_lists(read(chosen.labels), chosen.labels, chosen.separator, where)
    return NamedRows(joined, labels, where, None if chosen.scores is None else read(chosen.scores))


def label_lists(
    column: pa.ChunkedArray, name: str, separator: str | None, where: Callable[[int], str]
) -> pa.ChunkedArray:
    """Return a column of lists of label names, from lists or from strings with a separator."""
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.list_(pa.string()))
    if _is_string(kind):
        return _split(column.cast(pa.string()), name, separator, where)
    if separator is not None:
        raise ValueError(
            f"`separator` must be None for the column {name!r}, which contains {kind} instead of strings, got "
            f"{separator!r}."
        )
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and (_is_string(kind.value_type) or pa.types.is_null(kind.value_type)):
        return column.cast(pa.list_(pa.string()))
    row = _first(column)
    raise ValueError(
        f"{where(row)}: labels in column {name!r} must be names or uids, which are strings, got "
        f"{shown(column[row].as_py())}.{HINT}"
    )


def column_of(values: Sequence[Any], name: str, where: Callable[[int], str]) -> pa.ChunkedArray:
    """Return the cells of a column as an Arrow column; ``None`` is an empty cell.

    Raises:
        ValueError: if cells have different types. The message names the first row that differs.
    """
    values = [sorted(value) if isinstance(value, set | frozenset) else value for value in values]
    try:
        return pa.chunked_array([pa.array(values)])
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        first = next(value for value in values if value is not None)
        for row, value in enumerate(values):
            try:
                pa.array([first, value])
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{where(row)}: column {name!r} contains {shown(value)}, unlike the rows before, such as "
                    f"{shown(first)}. Write all cells of a column in one form."
                ) from None
        raise


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _first(column: pa.ChunkedArray) -> int:
    """Return the number of the first row that is not empty."""
    return int(pc.index(column.is_valid(), True).as_py())


def _text(column: pa.ChunkedArray, name: str, where: Callable[[int], str]) -> pa.Array:
    """Return a column of texts in which blank cells are empty strings."""
    if not (_is_string(column.type) or pa.types.is_null(column.type)):
        row = _first(column)
        raise ValueError(
            f"{where(row)}: text in column {name!r} must be a string, got {shown(column[row].as_py())}. Convert the "
            f"column first, such as `frame[{name!r}].astype(str)`."
        )
    texts = column.cast(pa.string()).combine_chunks().fill_null("")
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), "", texts)


def _joined(first: pa.Array, second: pa.Array) -> pa.Array:
    # `binary_join_element_wise(..., null_handling="skip")` drops rows in which every text is null.
    both = pc.binary_join_element_wise(first, second, " ")
    return pc.if_else(pc.equal(first, ""), second, pc.if_else(pc.equal(second, ""), first, both))


def _flags(column: pa.ChunkedArray, name: str, where: Callable[[int], str]) -> np.ndarray:
    """Return a mask ``(N,)`` of the cells of a column that are set."""
    encoded = column.combine_chunks().cast(pa.string()).fill_null("").dictionary_encode()
    codes = encoded.indices.to_numpy()
    values = encoded.dictionary.to_pylist()
    for code, value in enumerate(values):
        if value.strip().lower() not in FLAGS:
            raise ValueError(
                f"{where(int(np.flatnonzero(codes == code)[0]))}: column {name!r} must contain 0 or 1, because "
                f"`labels` names several columns, got {shown(value)}. For a column of label names, write "
                f"`labels={name!r}`."
            )
    flags: np.ndarray = np.array([FLAGS[value.strip().lower()] for value in values], dtype=bool)[codes]
    return flags


def _split(column: pa.ChunkedArray, name: str, separator: str | None, where: Callable[[int], str]) -> pa.ChunkedArray:
    """Split the strings of a column into label names, without the white space around separators."""
    given = column.fill_null("").combine_chunks()
    column = pc.utf8_trim_whitespace(given)
    lists = pc.match_substring_regex(column, r"^\[.*\]$")
    if pc.any(lists).as_py() and pc.all(pc.or_(lists, pc.equal(column, ""))).as_py():
        row = pc.index(lists, True).as_py()
        raise ValueError(
            f"{where(row)}: labels in column {name!r} are a list written as text, {shown(column[row].as_py())}. Write "
            f"the names with a separator, `frame[{name!r}].map(';'.join)`, or save the table as parquet."
        )
    if separator is None:
        for character in SEPARATORS:
            found = pc.match_substring(column, character)
            if pc.any(found).as_py():
                row = pc.index(found, True).as_py()
                raise ValueError(
                    f"{where(row)}: labels in column {name!r} are {shown(column[row].as_py())}. Is this one name or "
                    f"several? Pass `separator={character!r}` for several, or `separator=''` if each cell is one name."
                )
    if not separator:
        logger.info("column %r: reading each cell as the name of one label.", name)
        filled = pc.not_equal(column, "").to_numpy(zero_copy_only=False)
        offsets = np.append(0, filled.cumsum())
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), given.filter(pa.array(filled)))
    if separator and not pc.any(pc.match_substring(column, separator)).as_py():
        for character in SEPARATORS[:3]:  # a comma may be part of a name
            if pc.any(found := pc.match_substring(column, character)).as_py():
                row = pc.index(found, True).as_py()
                logger.warning(
                    "%s: no cell of column %r holds the separator %r, so each is read as one name, also %s. Is the "
                    "separator %r?",
                    where(row),
                    name,
                    separator,
                    shown(column[row].as_py()),
                    character,
                )
                break
    parts = pc.split_pattern(column, separator)
    rows = pc.list_parent_indices(parts).to_numpy()
    names = pc.utf8_trim_whitespace(pc.list_flatten(parts))
    filled = pc.not_equal(names, "").to_numpy(zero_copy_only=False)
    offsets = np.append(0, np.bincount(rows[filled], minlength=len(column)).cumsum())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.filter(pa.array(filled)))
