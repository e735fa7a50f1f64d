"""Labels: their uids, their texts, and the label of each text.

The whole package numbers labels in the same way: 0, 1, ... in the order in which their uids first occur in the table
of label texts. Each row without a uid is a separate label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint

from hf_xmc.data.columns import as_dataset, check_is_list, label_texts_of, texts_of

COLUMNS = {"uid": pa.string(), "text": pa.string(), "seen": pa.bool_(), "parent_texts": pa.string()}
REQUIRED = ("uid", "text")


def label_numbers(labels: Sequence[str] | Dataset) -> np.ndarray:
    """Return ``(T,)``, the label id of each row.

    Raises:
        ValueError: if a ``uid`` is missing, or the uids are not strings or numbers.

    >>> label_numbers(Dataset.from_dict({"uid": ["u7", "u2", "u7"], "text": ["boat", "car", "vessel"]}))
    array([0, 1, 0])
    """
    if not isinstance(labels, Dataset) or "uid" not in labels.column_names:
        return np.arange(len(labels))
    return _codes(_cast(_table(labels.select_columns("uid"))))


def count_labels(labels: Sequence[str] | Dataset) -> int:
    """Return the number of labels. A label may have several rows."""
    return int(label_numbers(labels).max(initial=-1)) + 1


class LabelTexts:
    """Labels and their texts. An object is immutable: methods that change labels return a new one.

    Attributes:
        texts: A row for each text, with ``uid``, ``text`` and, if they are known, ``seen``: whether the label was in
            the training, and ``parent_texts``: the texts of broader concepts, one per line. The texts of one label are
            adjacent.
        labels: The first row of each label. Its row number is the label id in an index and in a relevance matrix.
        label_of: ``(T,)``, the label id of each text.
        text_counts: ``(L,)``, the number of texts of each label; ``None`` if each has one.
    """

    def __init__(self, texts: pa.Table, label_of: np.ndarray | None = None) -> None:
        label_of = _codes(texts) if label_of is None else label_of
        first = np.flatnonzero(np.diff(label_of, prepend=-1))
        self.label_of = label_of
        self.texts = dataset_of(texts)
        self.labels = self.texts if len(first) == len(texts) else dataset_of(texts.take(first))
        self.text_counts = np.bincount(label_of) if self.several else None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, labels: Sequence[str] | Dataset, numbers: Iterable[str] | None = None) -> tuple[LabelTexts, np.ndarray]:
        """Return the labels, and ``(T,)``, the given row of each text.

        Args:
            labels: Texts, or a data set with a column ``text`` and optionally ``uid`` and ``seen``. Several rows with
                one uid are texts of one label; the first is preferred.
            numbers: The uids of texts without one; by default their row numbers.

        Raises:
            ValueError: if the labels are of another kind, or a text or a uid is missing.
        """
        rows = _rows(labels, map(str, count()) if numbers is None else numbers)
        codes = _codes(rows)
        pa.default_memory_pool().release_unused()  # reading and numbering took more than the table
        if (codes[1:] >= codes[:-1]).all():
            return cls(rows, codes), np.arange(len(codes))
        order = np.argsort(codes, kind="stable")
        return cls(rows.take(order)), order

    @property
    def several(self) -> bool:
        """Return whether any label has more than one text."""
        return len(self.texts) > len(self.labels)

    def rows_of(self, uids: Iterable[str]) -> np.ndarray:
        """Return the label ids of uids: their rows in :attr:`labels`.

        Raises:
            ValueError: if a uid is not a string, or no label has it.
        """
        check_is_list("a list of uids", uids)
        wanted = list(uids)
        for uid in wanted:
            if not isinstance(uid, str):
                kind = type(uid).__name__
                raise ValueError(f"a uid must be a string, as `predict` shows it, got {uid!r}, a {kind}.")
        places = pc.index_in(_column(self.labels, "uid"), value_set=pa.array(wanted, pa.string()))
        found = places.is_valid().to_numpy(zero_copy_only=False)
        row_of = dict(zip(places.drop_null().to_pylist(), np.flatnonzero(found).tolist(), strict=True))
        first = {uid: place for place, uid in reversed(list(enumerate(wanted)))}
        rows = np.array([row_of.get(first[uid], -1) for uid in wanted], dtype=np.int64)
        for place in np.flatnonzero(rows < 0)[:1]:
            raise ValueError(f"uid {wanted[place]!r} is not one of the {len(self)} labels.")
        return rows

    def known_rows(self, uids: Iterable[str]) -> dict[str, int]:
        """Return the label ids of the uids that are known, by uid."""
        row_of = {uid: row for row, uid in enumerate(self.labels["uid"])}
        return {uid: row_of[uid] for uid in uids if uid in row_of}

    def visible(self, allow: Iterable[str] | None, deny: Iterable[str] | None) -> np.ndarray:
        """Return a mask ``(L,)`` of the labels that are allowed and not denied, given their uids."""
        visible = np.full(len(self), allow is None)
        if allow is not None:
            visible[self.rows_of(allow)] = True
        if deny is not None:
            visible[self.rows_of(deny)] = False
        return visible

    def added(
        self, labels: Sequence[str] | Dataset, parents: Sequence[Sequence[str]] | None = None
    ) -> tuple[LabelTexts, LabelTexts]:
        """Return all labels with the new ones appended, and the new ones alone.

        ``seen`` is false for new labels unless it is given. Texts without a uid get the next free numbers.

        Args:
            labels: The new labels.
            parents: The broader concepts of each new label, by uid or text.

        Raises:
            ValueError: if a uid already exists, :meth:`of` refuses the labels, or there is not a list of parents for
                each label.
        """
        taken = set(self.labels["uid"])
        new, _ = LabelTexts.of(labels, (number for number in map(str, count(len(self))) if number not in taken))
        for uid in new.labels["uid"]:
            if uid in taken:
                raise ValueError(f"uid {uid!r} already exists. Give it another text with `rename_label`.")
        rows = _table(new.texts)
        if "seen" not in rows.column_names:
            rows = rows.append_column("seen", pa.array(np.zeros(len(rows), dtype=bool)))
        if parents is not None:
            uids, texts = ([*self.labels[name], *new.labels[name]] for name in ("uid", "text"))
            names = dict(zip(uids, texts, strict=True))
            above = np.array(_parent_texts(parents, len(new), names), object)[new.label_of]
            if "parent_texts" in rows.column_names:
                rows = rows.drop_columns(["parent_texts"])
            rows = rows.append_column("parent_texts", pa.array(above, pa.string()))
        both = pa.concat_tables([_table(self.texts), rows], promote_options="default")
        return LabelTexts(both), LabelTexts(rows)

    def kept(self, labels: np.ndarray) -> LabelTexts:
        """Return the labels in a mask ``(L,)``."""
        return LabelTexts(_table(self.texts).filter(pa.array(labels[self.label_of])))

    def renamed(self, label: int, text: str) -> tuple[LabelTexts, int]:
        """Return the labels with another preferred text for one, and the row of that text in :attr:`texts`."""
        row, table = int(np.searchsorted(self.label_of, label)), _table(self.texts)
        texts = [table["text"][:row], pa.chunked_array([[text]], table["text"].type), table["text"][row + 1 :]]
        column = pa.chunked_array([chunk for part in texts for chunk in part.chunks], table["text"].type)
        return LabelTexts(table.set_column(table.column_names.index("text"), "text", column)), row


def dataset_of(table: pa.Table) -> Dataset:
    """Return a data set of a table. Its fingerprint is random: ``datasets`` would pickle and hash the whole table."""
    return Dataset(table, fingerprint=generate_random_fingerprint())


def _parent_texts(parents: Sequence[Sequence[str]], number: int, names: Mapping[str, str]) -> list[str | None]:
    """Return the texts of the parents of each label, one per line; ``None`` without parents."""
    check_is_list("`parents` to be a list with the parents of each label", parents)
    if len(parents) != number:
        raise ValueError(f"`parents` must have a list for each of the {number} new labels, got {len(parents)}.")
    for row, above in enumerate(parents):
        check_is_list(f"a list of uids or texts as the parents of new label {row}", above)
        for one in above:
            if not isinstance(one, str):
                raise ValueError(f"the parents of new label {row} must be uids or texts, got {one!r}.")
    return ["\n".join(names.get(one, one) for one in above) or None for above in parents]


def _rows(labels: Sequence[str] | Dataset, numbers: Iterable[str]) -> pa.Table:
    if isinstance(labels, Dataset):
        labels = as_dataset(labels, "labels", "a column text")
        texts_of(labels, "labels, row ")
        table = _table(labels)
    else:
        table = pa.table({"text": pa.array(label_texts_of(labels), pa.string())})
    if "uid" not in table.column_names:
        table = table.append_column("uid", pa.array(list(islice(numbers, len(table))), pa.string()))
    return _cast(table.select([name for name in COLUMNS if name in table.column_names]))


def _cast(table: pa.Table) -> pa.Table:
    for place, name in enumerate(table.column_names):
        try:
            table = table.set_column(place, name, table[name].cast(COLUMNS[name]))
        except pa.ArrowException as error:
            raise ValueError(
                f"{name} of the labels must be {COLUMNS[name]}, got {table[name].type} ({error})."
            ) from None
        if table[name].null_count and name in REQUIRED:
            raise ValueError(f"label {table[name].is_null().index(True).as_py()} has no {name}.")
    return table


def _codes(table: pa.Table) -> np.ndarray:
    """Return ``(T,)``, the uids as numbers in the order of their first occurrence."""
    codes: np.ndarray = table["uid"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def _table(labels: Dataset) -> pa.Table:
    table = labels.with_format("arrow")[:]
    return table.replace_schema_metadata(None)


def _column(labels: Dataset, name: str) -> pa.ChunkedArray:
    return _table(labels.select_columns(name))[name]
