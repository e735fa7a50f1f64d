"""Make data sets of texts and label names from lists, data frames, and data sets of the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from hf_xmc.data.columns import as_dataset, shown
from hf_xmc.data.named import NamedRows, assemble_named
from hf_xmc.data.prepared import SPLITS, Parts
from hf_xmc.data.readers.user_columns import Chosen, choose, column_of, named_rows
from hf_xmc.data.vocabulary import Vocabulary

Made = TypeVar("Made", bound="FromNames")


class FromNames:
    """Constructors of :class:`hf_xmc.XMCData` from label names or uids."""

    @classmethod
    def of_parts(cls: type[Made], parts: Parts) -> Made:
        """Return a data set made of the parts from a reader."""
        return cls(**parts.tables, filter_pairs=parts.filter_pairs, load_report=parts.load_report)  # type: ignore[call-arg]

    @classmethod
    def from_lists(
        cls: type[Made],
        texts: Sequence[str],
        labels: Sequence[Sequence[str]],
        vocabulary: Any = None,
        *,
        validation: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
        test: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
        unknown: str = "error",
        filter_pairs: Mapping[str, Any] | None = None,
    ) -> Made:
        """Return a data set of texts and the names of their labels.

        Args:
            texts: ``N`` training texts.
            labels: ``N`` lists of label names or uids. A text may have none.
            vocabulary: All labels, in a form that :meth:`hf_xmc.data.vocabulary.Vocabulary.of` accepts: a list of
                names, a dict from ``uid`` to name or names, a table, or the path of a file. By default the labels that
                occur, in the order of their first occurrence, with the name as ``uid``.
            validation: Texts and labels of the validation split, in the same form.
            test: Texts and labels of the test split, in the same form.
            unknown: What to do with a label that is not in the vocabulary: ``"error"``, or ``"drop"``, which counts
                such labels in ``load_report``.
            filter_pairs: By split, such as ``test``, the pairs of a row and a label that a benchmark removes from
                predictions: ``{"test": [(0, "boat")]}``. A label is a name or uid, or a number, its label id.

        Raises:
            ValueError: if texts or labels have an invalid form, or a label is not in the vocabulary. The message names
                the row.

        >>> from hf_xmc import XMCData
        >>> data = XMCData.from_lists(["a sloop", "a kitten"], [["boat"], ["pet", "animal"]])
        >>> data.labels["text"][:], data.train["label_ids"][:]
        (['boat', 'pet', 'animal'], [[0], [1, 2]])
        """
        splits = {"train": (texts, labels)}
        for name, pair in (("validation", validation), ("test", test)):
            if pair is not None:
                if not isinstance(pair, tuple | list) or len(pair) != 2:
                    raise ValueError(f"{name} must be a pair of texts and labels, got {shown(pair)}.")
                splits[name] = pair[0], pair[1]
        rows = {name: _lists(name, *pair) for name, pair in splits.items()}
        return cls.of_parts(assemble_named(rows, _vocabulary(vocabulary), unknown=unknown, filter_pairs=filter_pairs))

    @classmethod
    def from_pandas(
        cls: type[Made],
        frame: Any,
        text: str | Sequence[str] | None = None,
        labels: str | Sequence[str] | None = None,
        separator: str | None = None,
        vocabulary: Any = None,
        *,
        validation: Any = None,
        test: Any = None,
        unknown: str = "error",
        filter_pairs: Mapping[str, Any] | None = None,
    ) -> Made:
        """Return a data set from the rows of a data frame.

        Args:
            frame: Training rows, a pandas ``DataFrame``.
            text: Column of the text. Several are joined in this order with a blank, and empty cells are skipped.
            labels: Column with lists of label names, or with strings of them; or several columns that hold 0 or 1, each
                named as its label.
            separator: Separator of the names in a string, such as ``";"``; ``""`` if each string is one name.
            vocabulary: As in :meth:`from_lists`.
            validation: Data frame of the validation split.
            test: Data frame of the test split.
            unknown, filter_pairs: As in :meth:`from_lists`.

        Raises:
            ValueError: if a column does not exist, a cell has another form, or a label is not in the vocabulary. The
                message names the row.

        >>> import pandas as pd
        >>> from hf_xmc import XMCData
        >>> frame = pd.DataFrame({"title": ["A sloop", "A kitten"], "subjects": ["boat", "pet; animal"]})
        >>> XMCData.from_pandas(frame, text="title", labels="subjects", separator=";").train["label_ids"][:]
        [[0], [1, 2]]
        """
        frames = {"train": frame, "validation": validation, "test": test}
        rows: dict[str, NamedRows] = {}
        flags = None
        for name, given in frames.items():
            if given is None and name != "train":
                continue
            if not hasattr(given, "columns") or not hasattr(given, "iloc"):
                hint = f" Write `load_xmc({str(given)!r}, text=..., labels=...)`." * isinstance(given, str | Path)
                raise ValueError(f"{name} must be a pandas DataFrame, got {_kind(given)}.{hint}")
            chosen = choose(given.columns, text, labels, "XMCData.from_pandas(frame", name)
            chosen = chosen._replace(separator=separator)
            rows[name] = _rows_of_frame(given, chosen, name)
            flags = None if isinstance(chosen.labels, str) else list(chosen.labels)
        return cls.of_parts(
            assemble_named(rows, _vocabulary(vocabulary or flags), unknown=unknown, filter_pairs=filter_pairs)
        )

    @classmethod
    def from_dataset(
        cls: type[Made],
        dataset: Dataset | Mapping[str, Dataset],
        text: str | Sequence[str] | None = None,
        labels: str | Sequence[str] | None = None,
        separator: str | None = None,
        vocabulary: Any = None,
        *,
        unknown: str = "error",
        filter_pairs: Mapping[str, Any] | None = None,
    ) -> Made:
        """Return a data set from a ``datasets.Dataset``, or a ``DatasetDict`` with ``train`` and other splits.

        Args:
            dataset: Training rows, or a mapping of ``train`` and optionally ``validation`` and ``test`` to rows.
            text: As in :meth:`from_pandas`.
            labels: As in :meth:`from_pandas`; or a column of ``ClassLabel`` values, whose names are the labels.
            separator: As in :meth:`from_pandas`.
            vocabulary: As in :meth:`from_lists`. By default the names of the ``ClassLabel``, if the column has one.
            unknown, filter_pairs: As in :meth:`from_lists`.

        Raises:
            ValueError: if a column does not exist, a cell has another form, or a label is not in the vocabulary. The
                message names the row.
        """
        splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
        rows: dict[str, NamedRows] = {}
        names: list[str] | None = None
        for name, given in splits.items():
            if name not in SPLITS or "train" not in splits:
                raise ValueError(
                    f"splits must be train and optionally validation and test, got {', '.join(map(str, splits))}. "
                    f'Write `XMCData.from_dataset({{"train": dataset[{next(iter(splits))!r}], ...}}, ...)`.'
                )
            part = as_dataset(given, name, "columns of texts and labels")
            chosen = choose(part.column_names, text, labels, "XMCData.from_dataset(dataset", name)
            chosen = chosen._replace(separator=separator)
            if not isinstance(chosen.labels, str):
                names = list(chosen.labels)
            elif found := _class_names(part.features[chosen.labels]):
                names = names or found
            rows[name] = _rows_of_dataset(part, chosen, name)
        return cls.of_parts(
            assemble_named(rows, _vocabulary(vocabulary or names), unknown=unknown, filter_pairs=filter_pairs)
        )


def _kind(given: object) -> str:
    return f"the path {str(given)!r}" if isinstance(given, str | Path) else f"a {type(given).__name__}"


def _vocabulary(given: Any) -> Vocabulary | None:
    return None if given is None else Vocabulary.of(given)


def _lists(split: str, texts: Any, labels: Any) -> NamedRows:
    for name, given in (("texts", texts), ("labels", labels)):
        if hasattr(given, "columns"):
            raise ValueError(
                f"{split}: {name} must be a list, got a {type(given).__name__}. "
                'Write `XMCData.from_pandas(frame, text="title", labels="subjects")` with the names of its columns.'
            )
        if isinstance(given, str | Path) and name == "labels":
            raise ValueError(
                f"{split}: labels must be a list of names for each text, got {given!r}. If it is the file of a "
                f"vocabulary, write `vocabulary={str(given)!r}`."
            )
        if isinstance(given, str | Path | Mapping | set) or not hasattr(given, "__len__"):
            hint = f" Put a single text in a list: `[{given!r}]`." if isinstance(given, str) else ""
            raise ValueError(f"{split}: {name} must be a list, got {shown(given)}.{hint}")
    labels = [_row(row) for row in labels]
    return NamedRows(list(texts), labels, (split + ", row {}").format)


def _row(labels: Any) -> Any:
    """Return the labels of a row: none for an empty cell of pandas, and in alphabetical order for a set."""
    if labels is None or (isinstance(labels, float) and np.isnan(labels)):
        return None
    if isinstance(labels, set | frozenset):
        return sorted(labels)
    return labels.tolist() if hasattr(labels, "tolist") else labels


def _rows_of_frame(frame: Any, chosen: Chosen, name: str) -> NamedRows:
    where = (name + ", row {}").format

    def read(column: str) -> pa.ChunkedArray:
        series = frame[column].astype(object)
        return column_of(series.where(series.notna(), None).tolist(), column, where)

    return named_rows(read, chosen, where)


def _rows_of_dataset(dataset: Dataset, chosen: Chosen, name: str) -> NamedRows:
    def read(column: str) -> pa.ChunkedArray:
        cells = dataset.with_format("arrow").select_columns(column)[:][column]
        names = _class_names(dataset.features[column])
        return cells if names is None else _with_names(cells, names)

    return named_rows(read, chosen._replace(separator=_separator(dataset, chosen)), (name + ", row {}").format)


def _separator(dataset: Dataset, chosen: Chosen) -> str | None:
    """Return the separator; names of a single ``ClassLabel`` are not split."""
    single = isinstance(chosen.labels, str) and isinstance(dataset.features[chosen.labels], ClassLabel)
    return "" if single else chosen.separator


def _class_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _with_names(cells: pa.ChunkedArray, names: list[str]) -> pa.ChunkedArray:
    """Replace the numbers of a ``ClassLabel`` by its names; -1 means no label."""
    table = pa.array([*names, None], pa.string())
    single = pa.types.is_integer(cells.type)
    places = np.asarray((cells if single else pc.list_flatten(cells)).fill_null(-1)).astype(np.int64)
    found = table.take(pa.array(np.where(places < 0, len(names), places)))
    if single:
        return pa.chunked_array([found])
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy()
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(np.append(0, lengths.cumsum()), pa.int32()), found)])
