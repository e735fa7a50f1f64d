"""A data set of extreme classification: queries with label ids, and labels with texts, memory-mapped once prepared."""

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
from hf_xmc.data.labels import label_numbers
from hf_xmc.data.numbering import check_filter_pairs, is_number, refuse_other_numbers
from hf_xmc.data.positives import check_queries, positives_of, with_positives
from hf_xmc.data.prepared import SPLITS
from hf_xmc.metrics.frequency import inverse_propensity
from hf_xmc.storage.commits import upon


@dataclass(frozen=True)
class XMCData:
    """Queries, labels, and which label belongs to which query.

    Attributes:
        train, validation, test: data sets with columns ``text``, ``label_ids`` (numbers of labels), and, where
            relevance is graded, ``label_scores``; ``None`` where there is no such split.
        labels: columns ``label_id`` (the label's own name outside) and ``text``. Several rows with one ``label_id``
            are texts of one label, the first preferred. Label ids in all other tables are numbers of labels, not of
            rows: they count in the order in which each ``label_id`` first occurs.
        filter_pairs: by split, ``(M, 2)`` pairs (row, label id) that a benchmark leaves out of predictions.
        notes: what was found and mended while loading, counted.

    Raises:
        ValueError: if a split or the labels are not a ``Dataset``, a column is missing or has a wrong form, a label id
            is out of range (the message names split, row and column), a ``label_id`` is missing, ``label_id`` holds
            other numbers than 0 to L - 1, or filter pairs do not belong to their split or to the labels.
    """

    train: Dataset
    labels: Dataset
    test: Dataset | None = None
    validation: Dataset | None = None
    filter_pairs: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = as_dataset(self.labels, "labels", "a column text")
        texts_of(labels, "labels, row ")
        given = {name: split for name in SPLITS if (split := getattr(self, name)) is not None or name == "train"}
        splits = {name: as_dataset(split, name) for name, split in given.items()}
        for name, table in {**splits, "labels": labels}.items():
            object.__setattr__(self, name, table)
        if "label_id" in labels.column_names:
            column = labels.with_format("arrow").select_columns("label_id")[:]["label_id"]
            if is_number(column.type):  # text is a name here; only in a file digits may be meant as a number
                used = [ragged(split, f"{name}, row ").label_ids for name, split in splits.items()]
                refuse_other_numbers(column, np.concatenate(used), "labels")
        for name, split in splits.items():
            check_queries(split, self.num_labels, name)
        for name, pairs in self.filter_pairs.items():
            num_rows = len(splits[name]) if name in splits else 0
            check_filter_pairs(np.asarray(pairs), num_rows, self.num_labels, f"filter_pairs of {name}")

    @cached_property
    def label_of(self) -> np.ndarray:
        """``(T,)``, the number of the label of each row of ``labels``: 0, 1, ... if each label has one text."""
        return label_numbers(self.labels)

    @property
    def num_labels(self) -> int:
        return int(self.label_of.max(initial=-1)) + 1

    def split(self, name: str) -> Dataset:
        """Return the split of this name."""
        present = [split for split in SPLITS if getattr(self, split) is not None]
        if name not in present:
            raise ValueError(f"there is no split {name!r}; this data set has {', '.join(present)}.")
        split: Dataset = getattr(self, name)
        return split

    def relevance(self, name: str) -> sp.csr_array:
        """``(N, L)`` float32: the scores of a split's positives, 1 where they are not graded."""
        return relevance_of(self.split(name), self.num_labels)

    def label_counts(self) -> np.ndarray:
        """Return the number of training queries of each label, ``(L,)``."""
        return np.bincount(positives_of(self.train, self.num_labels).label_ids, minlength=self.num_labels)

    def carve_validation(self, size: int | float = 0.05) -> XMCData:
        """Move ``size`` queries (or that share of them) from train to validation. Test is not looked at.

        The choice depends on the text alone (its SHA-1), not on the order of rows: the same text never stands on both
        sides, and the same queries are chosen each time.
        """
        if self.validation is not None:
            raise ValueError("there is a validation split already.")
        wanted = round(size * len(self.train)) if isinstance(size, float) else size
        if not 0 < wanted < len(self.train):
            raise ValueError(f"a validation split of {wanted} queries cannot be taken from {len(self.train)}.")
        digests = np.array([hashlib.sha1(text.encode()).digest() for text in self.train["text"]], dtype="S20")
        border = np.sort(digests)[wanted - 1]
        chosen = digests <= border  # all copies of the last text come along
        train, validation = np.flatnonzero(~chosen), np.flatnonzero(chosen)
        if not len(train):
            raise ValueError("every training query has the same text: there is nothing to carve from.")
        pairs = dict(self.filter_pairs)
        if "train" in pairs:
            old = pairs["train"]
            place = np.empty(len(chosen), dtype=np.int64)
            place[train], place[validation] = np.arange(len(train)), np.arange(len(validation))
            for name, rows in (("train", ~chosen), ("validation", chosen)):
                mine = old[rows[old[:, 0]]]
                pairs[name] = np.stack([place[mine[:, 0]], mine[:, 1]], axis=1)
        return replace(
            self, train=self.train.select(train), validation=self.train.select(validation), filter_pairs=pairs
        )

    def weigh_positives(self, exponent: float, a: float = 0.55, b: float = 1.5) -> XMCData:
        r"""The same, its training positives weighed for a loss: those of rare labels count more than frequent ones.

        A positive's score in the column ``label_scores``, 1 by default, is multiplied by :math:`w_l^\gamma`,
        :math:`w_l` the label's :func:`hf_xmc.metrics.frequency.inverse_propensity` and :math:`\gamma` the ``exponent``.
        With 1 the loss counts a label as PSP@k does (Jain, Prabhu, Varma, KDD 2016), with 0 all alike.

        Raises:
            ValueError: if ``exponent`` is not finite, or ``a`` and ``b`` are not a propensity model.
        """
        if not np.isfinite(exponent):
            raise ValueError(f"exponent must be a finite number, from 0 (all alike) to 1 (as PSP@k), got {exponent}.")
        positives = positives_of(self.train, self.num_labels)
        weights = inverse_propensity(self.label_counts(), len(self.train), a, b) ** exponent
        scores = weights[positives.label_ids] * (1 if positives.scores is None else positives.scores)
        return replace(self, train=with_positives(self.train, positives._replace(scores=scores)))

    def save(self, folder: str | Path) -> None:
        """Write the prepared form, which :func:`hf_xmc.load_xmc` opens memory-mapped.

        The folder appears whole or not at all. A prepared data set of this name is replaced, anything else refused.
        """
        tables = {"labels": self.labels}
        tables |= {name: split for name in SPLITS if (split := getattr(self, name)) is not None}
        prepared.write(Path(folder), tables, self.filter_pairs, self.notes)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
        """Publish as a data set of the Hub, which ``load_xmc(repo_id)`` reads, in one commit.

        Args:
            repo_id: ``org/name`` of the data set, which is created if it does not exist. Existing tables are replaced;
                the text of the card stays.
            private: who may see it.
            token: as everywhere on the Hub.

        Raises:
            RuntimeError: if the push fails. The repository then holds either the old data set or all of the new one.
        """
        tables = {f"default/{name}": split for name in SPLITS if (split := getattr(self, name)) is not None}
        for name, pairs in self.filter_pairs.items():
            tables[f"filter_pairs/{name}"] = Dataset.from_dict({"row": pairs[:, 0], "label": pairs[:, 1]})
        tables["labels/train"] = self.labels
        configs: dict[str, list[dict[str, str]]] = {}
        with TemporaryDirectory() as temporary, upon(repo_id, "dataset", private=private, token=token) as there:
            folder = Path(temporary)
            for name, table in tables.items():
                config, split = name.split("/")
                (folder / config).mkdir(exist_ok=True)
                table.to_parquet(folder / f"{name}.parquet")
                configs.setdefault(config, []).append({"split": split, "path": f"{name}.parquet"})
            listed = [{"config_name": name, "data_files": files} for name, files in configs.items()]
            there.write_card(folder / "README.md", configs=listed)
            names = ["README.md", *(f"{name}.parquet" for name in tables)]
            stale = [name for name in there.files - set(names) if name.endswith(".parquet")]
            there.replace(folder, names, without=stale, message="Queries, labels and filter pairs")


def relevance_of(queries: Dataset, num_labels: int) -> sp.csr_array:
    """``(N, L)`` float32: the scores of the queries' positives, 1 where they are not graded."""
    offsets, label_ids, scores = positives_of(queries, num_labels)
    values = np.ones(len(label_ids), dtype=np.float32) if scores is None else scores
    return sp.csr_array((values, label_ids, offsets), shape=(len(offsets) - 1, num_labels))
