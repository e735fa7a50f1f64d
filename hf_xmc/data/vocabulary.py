"""Vocabularies: labels with their texts, found by ``uid`` or by any of their texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_xmc.data.columns import as_dataset, shown
from hf_xmc.data.labels import label_numbers
from hf_xmc.data.readers.vocabularies import read_vocabulary

MERGED = "labels: names merged with another, equal but for white space around them"  # in `load_report`
AMBIGUOUS = -2
UNKNOWN = -1


class Vocabulary:
    """Labels with their texts. You can look up a label by its ``uid`` or any of its texts.

    Attributes:
        labels: One row per text, with columns ``uid`` and ``text``. Several rows of one ``uid`` are several texts of
            one label, the first preferred.
        label_of: ``(T,)`` label number of each row. Labels are numbered in the order in which their ``uid`` first
            occurs.
        load_report: Counts of skipped or replaced entries of a file.

    >>> vocabulary = Vocabulary.of({"n1": ["boat", "vessel"], "n2": "car"})
    >>> len(vocabulary), vocabulary.label_ids(["vessel", "n2", "plane"]).tolist()
    (2, [0, 1, -1])
    """

    def __init__(self, uids: Sequence[str] | pa.ChunkedArray, texts: Sequence[str] | pa.ChunkedArray) -> None:
        columns = {"uid": _strings(uids, "uid"), "text": _strings(texts, "text")}
        if not len(columns["uid"]):
            raise ValueError("`vocabulary` must have at least one label, got none.")
        self.load_report = Counter[str]()
        if merged := num_merged(columns["uid"], uids):
            self.load_report[MERGED] = merged
        self.labels = Dataset(pa.table(columns))
        self.label_of = label_numbers(self.labels)
        self._by_uid: dict[str, int] | None = None
        self._by_name: dict[str, int] | None = None

    def __len__(self) -> int:
        return int(self.label_of.max()) + 1

    @classmethod
    def of(cls, labels: Any) -> Vocabulary:
        """Return a vocabulary of labels in any of these forms.

        * A list of names. The ``uid`` of each label is its name.
        * A mapping from ``uid`` to a name, or to a list of names, the first preferred.
        * A pandas ``DataFrame`` or a ``Dataset`` with a column ``text`` and optionally ``uid``.
        * The path of a file, as in :meth:`read`.

        Raises:
            ValueError: if the labels have an invalid form, a ``uid`` or a text is missing or empty, a list repeats a
                name, or there are no labels.
        """
        if isinstance(labels, Vocabulary):
            return labels
        if isinstance(labels, str | Path):
            return cls.read(labels)
        if isinstance(labels, Mapping):
            pairs = [(uid, text) for uid, texts in labels.items() for text in _names_of(uid, texts)]
            return cls([uid for uid, _ in pairs], [text for _, text in pairs])
        if isinstance(labels, Dataset):
            return cls._of_table(as_dataset(labels, "vocabulary", "a column text").with_format("arrow")[:])
        if hasattr(labels, "columns") and hasattr(labels, "to_dict"):
            return cls._of_frame(labels)
        if not isinstance(labels, Iterable) or isinstance(labels, bytes | set | frozenset):
            raise ValueError(
                "`vocabulary` must be a list of names, a dict from uid to name, a Dataset or DataFrame with columns "
                f"uid and text, or the path of a file, got a {type(labels).__name__}."
            )
        return cls._of_names(list(labels))

    @classmethod
    def read(cls, path: str | Path, language: str = "en") -> Vocabulary:
        """Return the vocabulary in a file: names, a table, or a thesaurus in SKOS.

        See :func:`hf_xmc.data.readers.vocabularies.read_vocabulary` for the file formats. ``load_report`` counts
        skipped and replaced entries, and data sets with this vocabulary copy these counts.

        Args:
            path: Path of the file.
            language: Language of the texts, if the file has several.

        Raises:
            ValueError: if the file cannot be read, or has no text in ``language``.
        """
        report = Counter[str]()
        vocabulary = cls._of_table(read_vocabulary(path, report, language))
        vocabulary.load_report.update(report)
        return vocabulary

    @classmethod
    def _of_names(cls, names: list[Any]) -> Vocabulary:
        table = _strings(names, "name")
        if pc.count_distinct(table).as_py() < len(table):
            first: dict[str, int] = {}
            for place, name in enumerate(table.to_pylist()):
                if first.setdefault(name, place) != place:
                    raise ValueError(
                        f"`vocabulary` must name each label once, got {name!r} at positions {first[name]} and {place}. "
                        "`list(dict.fromkeys(names))` keeps the first of each."
                    )
        return cls(table, table)

    @classmethod
    def _of_frame(cls, frame: Any) -> Vocabulary:
        if "text" not in frame.columns:
            raise ValueError(
                f"`vocabulary` must have a column text, got the columns {', '.join(map(str, frame.columns))}. "
                "Rename a column with `frame.rename(columns={...})`."
            )
        columns = [column for column in ("uid", "text") if column in frame.columns]
        return cls._of_table(pa.Table.from_pydict({column: frame[column].tolist() for column in columns}))

    @classmethod
    def _of_table(cls, table: pa.Table) -> Vocabulary:
        if "text" not in table.column_names:
            raise ValueError(f"`vocabulary` must have a column text, got the columns {', '.join(table.column_names)}.")
        if "uid" not in table.column_names:
            return cls._of_names(table["text"].to_pylist())
        uid = table["uid"]
        return cls(uid.cast(pa.string()) if pa.types.is_integer(uid.type) else uid, table["text"])

    def label_ids(self, names: Sequence[str]) -> np.ndarray:
        """Return the label ids of names, -1 for an unknown name.

        A name is the ``uid`` of a label or one of its texts. If every name is a ``uid``, all are read as uids, so a
        text that equals the ``uid`` of another label does no harm.

        Raises:
            ValueError: if a name belongs to two labels. The message shows the name and both.
        """
        if self._by_uid is None:
            uids = pc.unique(self.labels.data.table["uid"]).to_pylist()
            self._by_uid = {uid: label for label, uid in enumerate(uids)}
        found = [self._by_uid.get(name, UNKNOWN) for name in names]
        if UNKNOWN not in found:
            return np.array(found, dtype=np.int64)
        if self._by_name is None:
            self._by_name = dict(self._by_uid)
            for text, label in zip(self.labels.data.table["text"].to_pylist(), self.label_of.tolist(), strict=True):
                if self._by_name.setdefault(text, label) != label:
                    self._by_name[text] = AMBIGUOUS
        found = [self._by_name.get(name, UNKNOWN) for name in names]
        if AMBIGUOUS in found:
            name = names[found.index(AMBIGUOUS)]
            one, other, *_ = self._uids_named(name)
            raise ValueError(
                f"label name {name!r} belongs to two labels of the vocabulary, {one!r} and {other!r}. Write the uid "
                "instead of the name, in every row."
            )
        return np.array(found, dtype=np.int64)

    def nearest(self, name: str) -> str | None:
        """Return the known name with the most similar spelling, or ``None`` if no name is close."""
        table = self.labels.data.table
        known = dict.fromkeys([*table["text"].to_pylist(), *table["uid"].to_pylist()])
        folded = name.casefold()
        if same := next((other for other in known if other.casefold() == folded), None):
            return same
        near = [other for other in known if abs(len(other) - len(name)) <= 3 and other[:1].casefold() == folded[:1]]
        return next(iter(get_close_matches(name, near[:20_000], n=1)), None)

    def _uids_named(self, name: str) -> list[str]:
        table = self.labels.data.table
        rows = table.filter(pc.or_(pc.equal(table["text"], name), pc.equal(table["uid"], name)))
        uids: list[str] = pc.unique(rows["uid"]).to_pylist()
        return uids


def _names_of(uid: object, texts: Any) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    names = list(texts) if isinstance(texts, Iterable) else []
    if not names:
        raise ValueError(f"`vocabulary` must give label {uid!r} a name or a list of names, got {shown(texts)}.")
    return names


def _strings(values: Any, noun: str) -> pa.ChunkedArray:
    """Return names without surrounding white space, as an Arrow column."""
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        for place, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(_wrong(noun, place, value))
        values = pa.array(values, pa.string())
    column = pa.chunked_array([values]) if isinstance(values, pa.Array) else values
    if pa.types.is_null(column.type) or not len(column):
        column = column.cast(pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError(_wrong(noun, 0, column[0].as_py()))
    column = pc.utf8_trim_whitespace(column.cast(pa.string()))
    bad = pc.equal(column, "") if noun == "text" else has_no_name(column)
    bad = pc.fill_null(bad, True)
    if pc.any(bad).as_py():
        place = pc.index(bad, True).as_py()
        raise ValueError(_wrong(noun, place, column[place].as_py()))
    return column


def num_merged(names: pa.Array | pa.ChunkedArray, given: Sequence[str] | pa.Array | pa.ChunkedArray) -> int:
    """Return how many more different names there are as given than without surrounding white space."""
    column = given if isinstance(given, pa.Array | pa.ChunkedArray) else pa.array(given, pa.string())
    return int(pc.count_distinct(column).as_py() - pc.count_distinct(names).as_py())


def has_no_name(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a mask of the strings that are empty or contain a tab or a line break."""
    return pc.or_(pc.equal(column, ""), pc.match_substring_regex(column, r"[\t\r\n]"))


def _wrong(noun: str, place: int, value: Any) -> str:
    start = f"vocabulary: {noun} {place} must be a string that is not empty, got {shown(value)}."
    if isinstance(value, str) and "\t" in value:
        uid, _, name = value.partition("\t")
        return (
            f"vocabulary: {noun} {place} must not contain a tab, got {shown(value)}. If the tab separates uid and "
            f"name, pass a dict: {{{uid!r}: {name!r}, ...}}."
        )
    if isinstance(value, str) and value:
        return f"vocabulary: {noun} {place} must not contain a line break, got {shown(value)}."
    if isinstance(value, int | float) and noun == "name":
        return f"{start} If these are label_ids, pass the names of the labels instead, starting with label id 0."
    if isinstance(value, int | float) and noun == "uid":
        return f"{start} Convert numbers with `{{str(uid): name for uid, name in labels.items()}}`."
    return start
