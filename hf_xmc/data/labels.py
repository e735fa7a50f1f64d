"""Labels: their names, their texts, and which text belongs to which label.

Every part of the package numbers labels in the same way: 0, 1, ... in the order in which their ids first occur in the
table of label texts. Rows without ids are labels of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count, islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_xmc.data.columns import as_dataset, label_texts_of, refuse_one, texts_of

COLUMNS = {"label_id": pa.string(), "text": pa.string(), "seen": pa.bool_()}


def label_numbers(labels: Sequence[str] | Dataset) -> np.ndarray:
    """Return ``(T,)``, the number of each row's label.

    Raises:
        ValueError: if a ``label_id`` is missing, or the ids are not strings or numbers.

    >>> label_numbers(Dataset.from_dict({"label_id": ["u7", "u2", "u7"], "text": ["boat", "car", "vessel"]}))
    array([0, 1, 0])
    """
    if not isinstance(labels, Dataset) or "label_id" not in labels.column_names:
        return np.arange(len(labels))
    return _codes(_cast(_table(labels.select_columns("label_id"))))


def count_labels(labels: Sequence[str] | Dataset) -> int:
    """Return the number of labels, of which some may have several rows."""
    return int(label_numbers(labels).max(initial=-1)) + 1


class LabelTexts:
    """Labels and their texts. It does not change: what is added or removed makes another.

    Attributes:
        texts: a row for each text, with ``label_id``, ``text`` and, where it is known, ``seen``: whether the label was
            in the training. Texts of one label stand together.
        labels: the first row of each label; the row number is what an index and a relevance matrix call it.
        label_of: ``(T,)``, the label of each text, as a row of ``labels``.
        text_counts: ``(L,)``, how many texts each label has; ``None`` if each has one.
    """

    def __init__(self, texts: pa.Table) -> None:
        label_of = _codes(texts)
        first = np.flatnonzero(np.diff(label_of, prepend=-1))
        self.label_of = label_of
        self.texts = Dataset(texts)
        self.labels = self.texts if len(first) == len(texts) else Dataset(texts.take(first))
        self.text_counts = np.bincount(label_of) if self.several else None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, labels: Sequence[str] | Dataset, numbers: Iterable[str] | None = None) -> tuple[LabelTexts, np.ndarray]:
        """The table of label texts, and the row in which each of its texts was given.

        Args:
            labels: texts, or a data set with ``text`` and optionally ``label_id``, a number by default, and ``seen``.
                A label id that stands in several rows is one label with several texts, the first preferred.
            numbers: those for texts without ids; by default those of the rows.

        Raises:
            ValueError: if the labels are of another kind, or a text or an id is missing.
        """
        rows = _rows(labels, map(str, count()) if numbers is None else numbers)
        order = np.argsort(_codes(rows), kind="stable")
        together = bool((order == np.arange(len(order))).all())
        return cls(rows if together else rows.take(order)), order

    @property
    def several(self) -> bool:
        """Return whether any label has more than one text."""
        return len(self.texts) > len(self.labels)

    def rows_of(self, label_ids: Iterable[str]) -> np.ndarray:
        """Rows in :attr:`labels` of label ids.

        Raises:
            ValueError: if an id is not a string, or is not an id of a label.
        """
        refuse_one("a list of label ids", label_ids)
        wanted = list(label_ids)
        for label_id in wanted:
            if not isinstance(label_id, str):
                kind = type(label_id).__name__
                raise ValueError(f"label_id {label_id!r} is a {kind}; expected a string, as `predict` shows it.")
        places = pc.index_in(_column(self.labels, "label_id"), value_set=pa.array(wanted, pa.string()))
        found = places.is_valid().to_numpy(zero_copy_only=False)
        row_of = dict(zip(places.drop_null().to_pylist(), np.flatnonzero(found).tolist(), strict=True))
        first = {label_id: place for place, label_id in reversed(list(enumerate(wanted)))}
        rows = np.array([row_of.get(first[label_id], -1) for label_id in wanted], dtype=np.int64)
        for place in np.flatnonzero(rows < 0)[:1]:
            raise ValueError(f"label_id {wanted[place]!r} is none of the {len(self)} labels.")
        return rows

    def visible(self, allow: Iterable[str] | None, deny: Iterable[str] | None) -> np.ndarray:
        """``(L,)``, whether a label is allowed and not denied."""
        visible = np.full(len(self), allow is None)
        if allow is not None:
            visible[self.rows_of(allow)] = True
        if deny is not None:
            visible[self.rows_of(deny)] = False
        return visible

    def added(self, labels: Sequence[str] | Dataset) -> tuple[LabelTexts, LabelTexts]:
        """Return the table with the new labels appended, and a table of the new labels alone.

        ``seen`` is false for the new labels unless it is given.

        Texts without ids get the next numbers that are free.

        Raises:
            ValueError: if an id already exists, or :meth:`of` refuses the labels.
        """
        taken = set(self.labels["label_id"])
        new, _ = LabelTexts.of(labels, (number for number in map(str, count(len(self))) if number not in taken))
        for label_id in new.labels["label_id"]:
            if label_id in taken:
                raise ValueError(f"label_id {label_id!r} is there already: `rename_label` gives it another text.")
        rows = _table(new.texts)
        if "seen" not in rows.column_names:
            rows = rows.append_column("seen", pa.array(np.zeros(len(rows), dtype=bool)))
        both = pa.concat_tables([_table(self.texts), rows], promote_options="default")
        return LabelTexts(both), LabelTexts(rows)

    def kept(self, labels: np.ndarray) -> LabelTexts:
        """These alone; ``labels`` is a mask ``(L,)``."""
        return LabelTexts(_table(self.texts).filter(pa.array(labels[self.label_of])))

    def renamed(self, label: int, text: str) -> tuple[LabelTexts, int]:
        """Return the table with another preferred text for a label, and the row of that text in :attr:`texts`."""
        row, table = int(np.searchsorted(self.label_of, label)), _table(self.texts)
        texts = [table["text"][:row], pa.chunked_array([[text]], table["text"].type), table["text"][row + 1 :]]
        column = pa.chunked_array([chunk for part in texts for chunk in part.chunks], table["text"].type)
        return LabelTexts(table.set_column(table.column_names.index("text"), "text", column)), row


def _rows(labels: Sequence[str] | Dataset, numbers: Iterable[str]) -> pa.Table:
    if isinstance(labels, Dataset):
        labels = as_dataset(labels, "labels", "a column text")
        texts_of(labels, "labels, row ")
        table = _table(labels)
    else:
        table = pa.table({"text": pa.array(label_texts_of(labels), pa.string())})
    if "label_id" not in table.column_names:
        table = table.append_column("label_id", pa.array(list(islice(numbers, len(table))), pa.string()))
    return _cast(table.select([name for name in COLUMNS if name in table.column_names]))


def _cast(table: pa.Table) -> pa.Table:
    for place, name in enumerate(table.column_names):
        try:
            table = table.set_column(place, name, table[name].cast(COLUMNS[name]))
        except pa.ArrowException as error:
            raise ValueError(
                f"{name} of the labels is {table[name].type}; expected {COLUMNS[name]} ({error})."
            ) from None
        if table[name].null_count and name != "seen":
            raise ValueError(f"label {table[name].is_null().index(True).as_py()} has no {name}.")
    return table


def _codes(table: pa.Table) -> np.ndarray:
    """``(T,)``, label ids numbered in the order in which they come up first."""
    codes: np.ndarray = table["label_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def _table(labels: Dataset) -> pa.Table:
    table = labels.with_format("arrow")[:]
    return table.replace_schema_metadata(None)


def _column(labels: Dataset, name: str) -> pa.ChunkedArray:
    return _table(labels.select_columns(name))[name]
