"""Rows for the losses of :mod:`hf_xmc.st_losses`: a query, one of its labels, and word of all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator

from hf_xmc.data.columns import as_dataset, texts_of
from hf_xmc.data.labels import LabelTexts
from hf_xmc.data.positives import positives_of
from hf_xmc.encoders.roles import prompt_of
from hf_xmc.padding import IGNORE_INDEX, pad

logger = logging.getLogger(__name__)

POSITIVES = ("padded", "ragged", "row")


def in_batch_dataset(
    queries: Dataset,
    labels: Sequence[str] | Dataset,
    *,
    hard_negatives: np.ndarray | None = None,
    positives: str = "padded",
) -> Dataset:
    """Columns ``anchor``, ``positive``, ``negative_1`` ..., ``label`` for the losses of :mod:`hf_xmc.st_losses`.

    Every time a row is read, one of its positives is drawn, by torch's generator: another one each epoch, the same ones
    for the same seed. Labels with equal texts count as one label. Of a label with several texts, one is drawn each
    time; if a batch holds two of them, the label scores as the first. Queries without labels cannot be drawn for and
    are left out, with a line in the log that counts them.

    Args:
        queries: columns ``text`` and ``label_ids``, as in :class:`hf_xmc.XMCData`.
        labels: label texts, or a data set with a column ``text`` and optionally ``label_id``. An id in several rows is
            one label with several texts.
        hard_negatives: ``(N, H)`` label ids a query, -100 for none. One that is a positive of its query is not used.
        positives: how ``label`` tells all positives of a query. ``"padded"`` to the longest, for the stock collator;
            ``"ragged"``, for :class:`InBatchCollator`; or ``"row"``, the query's place in ``queries``, for a loss that
            is given ``relevance=relevance_matrix(queries, labels)``: the shortest batch where a query has many.

    Raises:
        ValueError: if queries or labels have a wrong form (the message names row and column), or arguments do not fit
            each other.
    """
    if positives not in POSITIVES:
        raise ValueError(f"positives is one of {', '.join(POSITIVES)}, got {positives!r}.")
    queries = as_dataset(queries, "queries")
    if hard_negatives is not None and len(hard_negatives) != len(queries):
        raise ValueError(f"hard_negatives has {len(hard_negatives)} rows, and there are {len(queries)} queries.")
    texts, canonical, ids_of = _known_positives(queries, labels)
    kept = [row for row, ids in enumerate(ids_of) if ids]
    if len(kept) < len(queries):
        logger.warning("%d of %d queries have no label and are left out.", len(queries) - len(kept), len(queries))
    columns: dict[str, Any] = {
        "anchor": texts_of(queries, "queries, row ").take(pa.array(kept, pa.int64())),
        "row": kept,
        "positives": [ids_of[row] for row in kept],
    }
    if hard_negatives is not None:
        hard_negatives = np.asarray(hard_negatives)
        if hard_negatives.ndim != 2 or hard_negatives.dtype.kind not in "iu":
            raise ValueError(
                f"hard_negatives must be integers of shape (N, H), got {hard_negatives.dtype} of shape "
                f"{hard_negatives.shape}. `mine_hard_negatives` gives them."
            )
        for row, place in np.argwhere(hard_negatives >= len(texts))[:1]:
            raise ValueError(_out_of_range(f"hard_negatives, row {row},", hard_negatives[row, place], len(texts)))
        negatives = np.where(hard_negatives >= 0, canonical[hard_negatives.clip(0)], IGNORE_INDEX)[kept]
        for row, ids in enumerate(columns["positives"]):
            negatives[row, np.isin(negatives[row], ids)] = IGNORE_INDEX
        columns["negatives"] = negatives.tolist()
    width = max(map(len, columns["positives"]), default=0) if positives == "padded" else 0
    return Dataset.from_dict(columns).with_transform(_Draw(texts, width, names_row=positives == "row"))


@dataclass(frozen=True)
class _Draw:
    """The transform of :func:`in_batch_dataset`: draw one positive for each row.

    A class and not a function within one, so that data loaders can send it to worker processes that are spawned.
    """

    texts: list[list[str]]  # of each label
    width: int  # of the padded positives
    names_row: bool  # `label` begins with the row instead of ending with the positives

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        drawn = [ids[int(torch.randint(len(ids), ()))] for ids in batch["positives"]]
        out: dict[str, list[Any]] = {
            "anchor": batch["anchor"],
            "positive": [_one_of(self.texts[label]) for label in drawn],
        }
        others = batch.get("negatives") or [[] for _ in drawn]
        for number, column in enumerate(zip(*others, strict=True), start=1):
            out[f"negative_{number}"] = [_one_of(self.texts[label]) if label >= 0 else "" for label in column]
        candidates = [[label, *negatives] for label, negatives in zip(drawn, others, strict=True)]
        if self.names_row:
            out["label"] = [[row, *ids] for row, ids in zip(batch["row"], candidates, strict=True)]
        else:
            known = [[*ids, *[IGNORE_INDEX] * (self.width - len(ids))] for ids in batch["positives"]]
            out["label"] = [[*ids, *all_of_them] for ids, all_of_them in zip(candidates, known, strict=True)]
        return out


def in_batch_prompts(encoder: SentenceTransformer, num_negatives: int = 0) -> dict[str, str]:
    """Return the argument ``prompts`` with which the stock trainer embeds the columns of :func:`in_batch_dataset` as
    ``encode_query`` and ``encode_document`` do.

    The stock trainer adds no prompt of the encoder by itself. It does not apply ``truncate_dim`` either.

    Args:
        encoder: The encoder. A query takes its prompt for queries, and a label its prompt for documents.
        num_negatives: The number of columns ``negative_1`` and so on.

    >>> args = SentenceTransformerTrainingArguments("run", prompts=in_batch_prompts(model))  # doctest: +SKIP
    """
    query, document = prompt_of(encoder, "query") or "", prompt_of(encoder, "document") or ""
    negatives = {f"negative_{number}": document for number in range(1, num_negatives + 1)}
    return {"anchor": query, "positive": document, **negatives}


def relevance_matrix(queries: Dataset, labels: Sequence[str] | Dataset) -> sp.csr_array:
    """``(N, L)``, the positives of each query, where labels with equal texts count as the first of them.

    >>> queries = Dataset.from_dict({"text": ["a", "b"], "label_ids": [[2], [1, 2]]})
    >>> relevance_matrix(queries, ["boat", "car", "boat"]).toarray()
    array([[1., 0., 0.],
           [1., 1., 0.]], dtype=float32)
    """
    texts, _, ids_of = _known_positives(queries, labels)
    offsets = np.cumsum([0, *map(len, ids_of)])
    columns = np.array([label for ids in ids_of for label in ids], dtype=np.int64)
    return sp.csr_array((np.ones(len(columns), np.float32), columns, offsets), shape=(len(queries), len(texts)))


def _one_of(texts: list[str]) -> str:
    return texts[int(torch.randint(len(texts), ())) if len(texts) > 1 else 0]


def _known_positives(
    queries: Dataset, labels: Sequence[str] | Dataset
) -> tuple[list[list[str]], np.ndarray, list[list[int]]]:
    """Return the texts of each label, the first label with the same texts, and the positives of each query in those
    numbers."""
    table, _ = LabelTexts.of(labels)
    texts: list[list[str]] = [[] for _ in range(len(table))]
    for label, text in zip(table.label_of.tolist(), table.texts["text"][:], strict=True):
        texts[label].append(text)
    queries = as_dataset(queries, "queries")
    sets = [frozenset(of_label) for of_label in texts]
    first_of = {of_label: label for label, of_label in reversed(list(enumerate(sets)))}
    canonical = np.array([first_of[of_label] for of_label in sets], dtype=np.int64)
    offsets, label_ids, _ = positives_of(queries, len(texts), "queries, row ")
    known = canonical[label_ids].tolist()
    return texts, canonical, [sorted(set(known[start:stop])) for start, stop in pairwise(offsets.tolist())]


def _out_of_range(where: str, label: int, num_labels: int) -> str:
    return (
        f"{where} has label id {label}, but there are only {num_labels} labels (ids 0 to {num_labels - 1}). Were the "
        "queries and the labels loaded from the same data set?"
    )


@dataclass
class InBatchCollator(BaseDataCollator):
    """The stock collator, for a column ``label`` whose rows differ in length."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        label = pad([row["label"] for row in features])
        return super().__call__([{**row, "label": ids} for row, ids in zip(features, label, strict=True)])
