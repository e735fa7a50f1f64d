"""Data sets of extreme classification: queries with label ids, and labels with texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import scipy.sparse as sp
from datasets import Dataset

from hf_xmc.data import prepared
from hf_xmc.data.columns import as_dataset, ragged, texts_of
from hf_xmc.data.constructors import FromNames
from hf_xmc.data.labels import label_numbers
from hf_xmc.data.numbering import check_filter_pairs, check_numbering, is_number
from hf_xmc.data.positives import check_queries, positives_of, with_positives
from hf_xmc.data.prepared import SPLITS
from hf_xmc.data.progress import no_bar_for_few
from hf_xmc.metrics.frequency import inverse_propensity
from hf_xmc.storage.commits import commit_to


@dataclass(frozen=True)
class XMCData(FromNames):
    """Queries, labels, and the labels of each query.

    Attributes:
        train, validation, test: Data sets with columns ``text``, ``label_ids`` and, if relevance is graded,
            ``label_scores``; ``None`` if the split is missing.
        labels: Columns ``uid``, the external name of a label, and ``text``. Several rows with one ``uid`` are texts of
            one label, the first preferred. Label ids number the labels, not the rows, from 0 in the order in
            which each ``uid`` first occurs.
        filter_pairs: By split, ``(M, 2)`` pairs (row, label id) that a benchmark removes from predictions.
        load_report: Counts of corrections and of unusual entries.

    Raises:
        ValueError: if a split or the labels are not a ``Dataset``, a column is missing or has a wrong form, a label id
            is out of range (the message names split, row and column), a ``uid`` is missing, ``uid`` holds
            numbers other than 0 to L - 1, or filter pairs are outside of their split or the labels.
    """

    train: Dataset
    labels: Dataset
    test: Dataset | None = None
    validation: Dataset | None = None
    filter_pairs: Mapping[str, np.ndarray] = field(default_factory=dict)
    load_report: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = as_dataset(self.labels, "labels", "a column text")
        texts_of(labels, "labels, row ")
        given = {name: split for name in SPLITS if (split := getattr(self, name)) is not None or name == "train"}
        splits = {name: as_dataset(split, name) for name, split in given.items()}
        for name, table in {**splits, "labels": labels}.items():
            object.__setattr__(self, name, table)
        if "uid" in labels.column_names:
            column = labels.with_format("arrow").select_columns("uid")[:]["uid"]
            if is_number(column.type):  # a string is a name here; only in a file may digits be meant as a number
                used = [ragged(split, f"{name}, row ").label_ids for name, split in splits.items()]
                check_numbering(column, np.concatenate(used), "labels")
        for name, split in splits.items():
            check_queries(split, self.num_labels, name)
        for name, pairs in self.filter_pairs.items():
            num_rows = len(splits[name]) if name in splits else 0
            check_filter_pairs(np.asarray(pairs), num_rows, self.num_labels, f"filter_pairs of {name}")

    @cached_property
    def label_of(self) -> np.ndarray:
        """The label id of each row of ``labels``, ``(T,)``: 0, 1, ... if each label has one text."""
        return label_numbers(self.labels)

    @property
    def num_labels(self) -> int:
        return int(self.label_of.max(initial=-1)) + 1

    def split(self, name: str) -> Dataset:
        """Return the split with this name."""
        present = [split for split in SPLITS if getattr(self, split) is not None]
        if name not in present:
            raise ValueError(f"there is no split {name!r}, only {', '.join(present)}.")
        split: Dataset = getattr(self, name)
        return split

    def relevance(self, name: str) -> sp.csr_array:
        """Return ``(N, L)`` float32: the scores of the positives of a split, 1 if they are not graded."""
        return relevance_of(self.split(name), self.num_labels)

    def label_counts(self) -> np.ndarray:
        """Return the number of training queries of each label, ``(L,)``."""
        return np.bincount(positives_of(self.train, self.num_labels).label_ids, minlength=self.num_labels)

    def carve_validation(self, size: int | float = 0.05) -> XMCData:
        """Move ``size`` queries, or that fraction of them, from train to validation; see :meth:`move_from_train`.

        Raises:
            ValueError: if a validation split exists, or if the training queries are too few or all equal.
        """
        return self.move_from_train("validation", size)

    def move_from_train(self, name: str, size: int | float, seed: int = 0) -> XMCData:
        """Return the data with training queries moved to a new split.

        The selection depends on the texts and the seed alone, by the SHA-1 of each text, and not on the order of rows.
        Queries of equal text stay together.

        Args:
            name: Name of the new split, ``"validation"`` or ``"test"``.
            size: Number of queries, or a fraction of them as a ``float``.
            seed: Seed of the selection.

        Raises:
            ValueError: if the split exists, or if the training queries are too few or all equal.
        """
        if getattr(self, name) is not None:
            raise ValueError(f"the data set already has a {name} split.")
        wanted = round(size * len(self.train)) if isinstance(size, float) else size
        if not 0 < wanted < len(self.train):
            raise ValueError(
                f"`size` must leave some of the {len(self.train)} training queries and take at least one, got {wanted}."
            )
        texts = texts_of(self.train).to_pylist()
        salt = f"{seed} ".encode() if seed else b""
        digests = np.array([hashlib.sha1(salt + text.encode()).digest() for text in texts], dtype="S20")
        border = np.sort(digests)[wanted - 1]
        chosen = digests <= border  # includes all copies of the last text
        train, moved = np.flatnonzero(~chosen), np.flatnonzero(chosen)
        if not len(train):
            raise ValueError(f"a {name} split needs training queries with different texts, but all texts are equal.")
        pairs = dict(self.filter_pairs)
        if "train" in pairs:
            old = pairs["train"]
            place = np.empty(len(chosen), dtype=np.int64)
            place[train], place[moved] = np.arange(len(train)), np.arange(len(moved))
            for split, rows in (("train", ~chosen), (name, chosen)):
                mine = old[rows[old[:, 0]]]
                pairs[split] = np.stack([place[mine[:, 0]], mine[:, 1]], axis=1)
        splits = {"train": _rows(self.train, train), name: _rows(self.train, moved)}
        return replace(self, **splits, filter_pairs=pairs)

    def weight_positives(self, exponent: float, a: float = 0.55, b: float = 1.5) -> XMCData:
        r"""Return the data with weighted training positives, so that rare labels count more in a loss.

        A positive's score in the column ``label_scores``, 1 by default, is multiplied by :math:`w_l^\gamma`,
        :math:`w_l` the label's :func:`hf_xmc.metrics.frequency.inverse_propensity` and :math:`\gamma` the ``exponent``.
        With 1, the loss weights labels like PSP@k (Jain, Prabhu, Varma, KDD 2016); with 0, all labels equally.

        Raises:
            ValueError: if ``exponent`` is not finite, or ``a`` or ``b`` is out of range.
        """
        if not np.isfinite(exponent):
            raise ValueError(
                f"`exponent` must be a finite number, from 0 (equal weights) to 1 (as in PSP@k), got {exponent}."
            )
        positives = positives_of(self.train, self.num_labels)
        weights = inverse_propensity(self.label_counts(), len(self.train), a, b) ** exponent
        scores = weights[positives.label_ids] * (1 if positives.scores is None else positives.scores)
        return replace(self, train=with_positives(self.train, positives._replace(scores=scores)))

    def save(self, folder: str | Path) -> None:
        """Write a prepared data set that :func:`hf_xmc.load_xmc` memory-maps.

        The folder is written completely or not at all. An existing prepared data set is replaced, and a folder with
        other content is refused.
        """
        tables = {"labels": self.labels}
        tables |= {name: split for name in SPLITS if (split := getattr(self, name)) is not None}
        prepared.write(Path(folder), tables, self.filter_pairs, self.load_report)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
        """Publish the data on the Hub in one commit, for ``load_xmc(repo_id)``.

        Args:
            repo_id: ``org/name`` of the data set, which is created if it does not exist. Existing tables are replaced.
                The text of the card stays.
            private: Whether a new repository is private.
            token: As in huggingface_hub.

        Raises:
            RuntimeError: if the push fails. The repository then holds either the old data set or all of the new one.
        """
        tables = {f"default/{name}": split for name in SPLITS if (split := getattr(self, name)) is not None}
        for name, pairs in self.filter_pairs.items():
            tables[f"filter_pairs/{name}"] = Dataset.from_dict({"row": pairs[:, 0], "label": pairs[:, 1]})
        tables["labels/train"] = self.labels
        configs: dict[str, list[dict[str, str]]] = {}
        with TemporaryDirectory() as temporary, commit_to(repo_id, "dataset", private=private, token=token) as there:
            folder = Path(temporary)
            for name, table in tables.items():
                config, split = name.split("/")
                (folder / config).mkdir(exist_ok=True)
                with no_bar_for_few(len(table)):
                    table.to_parquet(folder / f"{name}.parquet")
                configs.setdefault(config, []).append({"split": split, "path": f"{name}.parquet"})
            listed = [{"config_name": name, "data_files": files} for name, files in configs.items()]
            there.write_card(folder / "README.md", configs=listed)
            names = ["README.md", *(f"{name}.parquet" for name in tables)]
            stale = [name for name in there.files - set(names) if name.endswith(".parquet")]
            there.replace(folder, names, without=stale, message="Queries, labels and filter pairs")


def _rows(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Return rows of a data set. Rows in memory are copied, which is faster to read than a selection."""
    if dataset.cache_files:
        return dataset.select(rows)
    return Dataset(dataset.with_format("arrow")[:].take(rows))


def relevance_of(queries: Dataset, num_labels: int) -> sp.csr_array:
    """Return ``(N, L)`` float32: the scores of the positives of queries, 1 if they are not graded."""
    offsets, label_ids, scores = positives_of(queries, num_labels)
    values = np.ones(len(label_ids), dtype=np.float32) if scores is None else scores
    return sp.csr_array((values, label_ids, offsets), shape=(len(offsets) - 1, num_labels))
