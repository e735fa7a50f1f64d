"""Turn queries with label names or uids into queries with label ids, and rows into a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_xmc.data.assembly import assemble, count, label_table
from hf_xmc.data.columns import row_of, shown
from hf_xmc.data.positives import check_scores, kept_positives
from hf_xmc.data.prepared import SPLITS, Parts
from hf_xmc.data.readers.formats import Rows
from hf_xmc.data.vocabulary import MERGED, Vocabulary, has_no_name, num_merged

__all__ = ["NamedRows", "Vocabulary", "assemble_named"]


@dataclass
class NamedRows:
    """Queries as a reader returns them, with labels by name or ``uid``.

    Attributes:
        texts: ``N`` texts, as a list or an Arrow column.
        labels: Names or uids of the labels of each text, as a list of lists or an Arrow column of lists. ``None``
            stands for a text without labels.
        where: Function that returns the position of a row for messages, such as ``books.csv:7``.
        scores: Relevance of each label, in the form of ``labels``; ``None`` if relevance is not graded.
    """

    texts: Sequence[str] | pa.ChunkedArray
    labels: Sequence[Sequence[str] | None] | pa.ChunkedArray
    where: Callable[[int], str]
    scores: Sequence[Sequence[float]] | pa.ChunkedArray | None = None


def assemble_named(
    splits: Mapping[str, NamedRows],
    vocabulary: Vocabulary | None = None,
    *,
    unknown: str = "error",
    filter_pairs: Mapping[str, Any] | None = None,
    load_report: Counter[str] | None = None,
) -> Parts:
    """Return the parts of a data set, for :meth:`hf_xmc.XMCData.of_parts`. Label names are replaced by label ids.

    Args:
        splits: Rows of ``train`` and optionally ``validation`` and ``test``.
        vocabulary: All labels. By default the labels that occur, in the order of their first occurrence, train first,
            with the name as ``uid``.
        unknown: What to do with a label that is not in the vocabulary: ``"error"``, or ``"drop"``, which counts them
            in the report.
        filter_pairs: By split, pairs of a row and a label, which is a label id, or a name or uid.
        load_report: Counts of corrections by a reader, to which this function adds.

    Raises:
        ValueError: if a text or a label is missing or is not a string, a label is not in the vocabulary or belongs to
            two of its labels, or there are no labels. The message names the row.
    """
    if unknown not in ("error", "drop"):
        raise ValueError(f"`unknown` must be 'error' or 'drop', got {unknown!r}.")
    report = Counter[str]() if load_report is None else load_report
    ordered = {name: splits[name] for name in SPLITS if name in splits}
    if missing := set(splits) - set(ordered):
        raise ValueError(f"splits must be among {', '.join(SPLITS)}, got {', '.join(sorted(missing))}.")
    lists = {name: _lists(rows, name, vocabulary is not None) for name, rows in ordered.items()}
    if vocabulary is None:
        named, raw = (pa.chunked_array([part[at] for part in lists.values()], pa.string()) for at in (1, 2))
        count(report, MERGED, num_merged(named, raw))
        seen = pc.unique(named)
        if not len(seen):
            raise ValueError("labels: at least one row must have a label. Pass the names of the labels of each text.")
        vocabulary = Vocabulary(seen, seen)
    report.update(vocabulary.load_report)
    labels = vocabulary.labels
    table = labels.data.table
    label_table(table["text"], table["uid"].to_pylist(), "vocabulary", report)
    rows = {name: _rows(name, ordered[name], *lists[name][:2], vocabulary, unknown, report) for name in ordered}
    pairs = {
        name: numbered_pairs(given, vocabulary, f"filter_pairs of {name}", report)
        for name, given in (filter_pairs or {}).items()
    }
    return assemble(labels, rows, pairs, report)


def numbered_pairs(pairs: Any, vocabulary: Vocabulary, where: str, report: Counter[str]) -> np.ndarray:
    """Return ``(M, 2)`` filter pairs (row, label id), each once. Repeated pairs are counted in the report.

    Args:
        pairs: Pairs of a row and a label. Labels are either all numbers, which are label ids, or all names or uids.
        vocabulary: All labels.
        where: Name of the pairs for messages.
        report: Counts of corrections, to which this function adds.

    Raises:
        ValueError: if a pair has another form, or a label is not in the vocabulary.
    """
    given = pairs.tolist() if isinstance(pairs, np.ndarray) else list(pairs)
    for number, pair in enumerate(given):
        ok = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], Integral)
        if not ok or not isinstance(pair[1], Integral | str):
            raise ValueError(f"{where}, pair {number}: expected a row and a label, such as (0, 'boat'), got {pair!r}.")
    named = [isinstance(label, str) for _, label in given]
    if any(named):
        if not all(named):
            raise ValueError(f"{where}: labels must be all names or all label ids, got {given[named.index(False)]!r}.")
        label_ids = vocabulary.label_ids([label.strip() for _, label in given])
        for number in np.flatnonzero(label_ids < 0)[:1]:
            raise ValueError(
                f"{where}, pair {number}: label {given[number][1]!r} is not in the vocabulary of {len(vocabulary)} "
                "labels."
            )
        given = [(row, label) for (row, _), label in zip(given, label_ids.tolist(), strict=True)]
    table = np.array(given, dtype=np.int64).reshape(-1, 2)
    unique = np.unique(table, axis=0)
    count(report, f"{where}: repeated pairs", len(table) - len(unique))
    return unique


def named_queries(rows: NamedRows, vocabulary: Vocabulary) -> Dataset:
    """Return queries with columns ``text`` and ``label_ids``; errors as in :func:`assemble_named`."""
    return assemble_named({"train": rows}, vocabulary).tables["train"]


def _rows(
    split: str,
    given: NamedRows,
    offsets: np.ndarray,
    names: pa.Array,
    vocabulary: Vocabulary,
    unknown: str,
    report: Counter[str],
) -> Rows:
    encoded = names.dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    found = _label_ids(split, given, offsets, codes, distinct, vocabulary)
    label_ids = found[codes] if len(codes) else np.zeros(0, np.int64)
    scores = None if given.scores is None else _scores(given, offsets, split)
    if scores is not None:
        check_scores(offsets, label_ids, scores, given.where)
    known = label_ids >= 0
    if not known.all():
        at = int(np.flatnonzero(~known)[0])
        name = distinct[codes[at]]
        if unknown == "error":
            others = int((found < 0).sum()) - 1
            near = None if "\t" in name or "://" in name else vocabulary.nearest(name)  # a URI is hardly misspelt
            raise ValueError(
                f"{given.where(row_of(offsets, at))}: label {name!r} is not in the vocabulary of {len(vocabulary)} "
                f"labels{f', and neither are {others} others' if others else ''}."
                f'{f" Did you mean {near!r}?" if near else ""} `unknown="drop"` drops and counts such labels.'
            )
        count(report, f"{split}: dropped labels that are not in the vocabulary", int((~known).sum()))
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[known]
    label_ids, scores = label_ids[known], None if scores is None else scores[known]
    order = np.lexsort((label_ids, rows))  # ascending, so that no row looks like flags, one per label
    rows, label_ids, scores = rows[order], label_ids[order], None if scores is None else scores[order]
    keep, zeros, repeated = kept_positives(_offsets(rows, len(offsets) - 1), label_ids, scores, len(vocabulary))
    count(report, f"{split}: relevance 0, not a positive", zeros)
    count(report, f"{split}: repeated label of a query", repeated)
    new_offsets = _offsets(rows[keep], len(offsets) - 1)
    return Rows(_texts(given), new_offsets, label_ids[keep], None if scores is None else scores[keep], given.where)


def _label_ids(
    split: str,
    given: NamedRows,
    offsets: np.ndarray,
    codes: np.ndarray,
    distinct: list[str],
    vocabulary: Vocabulary,
) -> np.ndarray:
    try:
        return vocabulary.label_ids(distinct)
    except ValueError as error:
        for code, name in enumerate(distinct):
            if f"label name {name!r} " in str(error):
                at = int(np.flatnonzero(codes == code)[0])
                raise ValueError(f"{given.where(row_of(offsets, at))}: {error}") from None
        raise


def _offsets(rows: np.ndarray, num_rows: int) -> np.ndarray:
    return np.append(0, np.bincount(rows, minlength=num_rows).cumsum())


def _texts(rows: NamedRows) -> pa.ChunkedArray:
    texts = rows.texts
    if not isinstance(texts, pa.ChunkedArray | pa.Array):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{rows.where(row)}: text must be a string, got {shown(text)}.")
        texts = pa.array(texts, pa.string())
    if texts.null_count:
        raise ValueError(f"{rows.where(pc.index(texts.is_null(), True).as_py())}: the text is missing.")
    column = pa.chunked_array([texts]) if isinstance(texts, pa.Array) else texts
    return column.cast(pa.string())


def _lists(rows: NamedRows, split: str, any_name: bool) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """Return the offsets of rows, and the names in them, without surrounding white space and as given."""
    if len(rows.texts) != len(rows.labels):
        raise ValueError(
            f"{split}: texts and labels must have the same length, got {len(rows.texts)} texts and {len(rows.labels)} "
            "lists of labels."
        )
    lists = rows.labels
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.combine_chunks()
    elif not isinstance(lists, pa.Array):
        if any(isinstance(labels, str) for labels in lists):  # Arrow would read its letters as names
            _raise_for_labels(rows)
        try:
            lists = pa.array(lists, pa.list_(pa.string()))
        except (pa.ArrowException, TypeError, ValueError):
            _raise_for_labels(rows)
            raise
    if pa.types.is_null(lists.type):
        lists = lists.cast(pa.list_(pa.string()))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.append(0, lengths.cumsum()).astype(np.int64)
    given = pc.list_flatten(lists).cast(pa.string())
    names = pc.utf8_trim_whitespace(given)
    bad = pc.fill_null(pc.equal(names, "") if any_name else has_no_name(names), True)
    if pc.any(bad).as_py():
        at = pc.index(bad, True).as_py()
        where, name = rows.where(row_of(offsets, at)), names[at].as_py()
        if not name:
            raise ValueError(f"{where}: a label must be a name or a uid, got {name!r}. A row may have no labels: [].")
        raise ValueError(
            f"{where}: a label must not contain a tab or a line break, got {shown(name)}.{_about_tabs(name)}"
        )
    return offsets, names, given


def _raise_for_labels(rows: NamedRows) -> None:
    """Raise for the first row whose labels are not a list of strings."""
    for row, labels in enumerate(rows.labels):
        if isinstance(labels, str):
            raise ValueError(
                f"{rows.where(row)}: labels must be a list of names, got the string {shown(labels)}. Write "
                '`labels=[[name] for name in labels]`, or pass `separator=";"` to `XMCData.from_pandas`.'
            )
        if labels is not None and not (isinstance(labels, Sequence | set) or hasattr(labels, "__array__")):
            raise ValueError(f"{rows.where(row)}: labels must be a list of names, got {shown(labels)}.")
        for label in labels if labels is not None else ():
            if not isinstance(label, str):
                raise ValueError(
                    f"{rows.where(row)}: a label must be a name or a uid, which are strings, got {shown(label)}.{HINT}"
                )


def _about_tabs(name: str) -> str:
    return ' If tabs separate names, pass `separator="\\t"`.' if "\t" in name else ""


HINT = (
    " If numbers are uids, write them as strings: `[[str(uid) for uid in row] for row in labels]`. If they are "
    "positions in a list of names, write `[[names[number] for number in row] for row in labels]`."
)


def _scores(rows: NamedRows, offsets: np.ndarray, split: str) -> np.ndarray:
    given: Any = rows.scores
    lists = given.combine_chunks() if isinstance(given, pa.ChunkedArray) else pa.array(given, pa.list_(pa.float32()))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    if len(lengths) != len(offsets) - 1:
        raise ValueError(f"{split}: scores must have {len(offsets) - 1} rows, like labels, got {len(lengths)}.")
    for row in np.flatnonzero(lengths != np.diff(offsets))[:1]:
        raise ValueError(
            f"{rows.where(row)}: labels and scores must have the same length, got {np.diff(offsets)[row]} labels and "
            f"{lengths[row]} scores."
        )
    scores: np.ndarray = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.float32)
    return scores
