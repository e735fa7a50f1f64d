"""Rows for the losses of :mod:`hf_xmc.st_losses`: a query, one of its labels, and the ids of all its labels."""

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
    """Return a data set with the columns ``anchor``, ``positive``, ``negative_1`` ... and ``label``.

    It is for the losses of :mod:`hf_xmc.st_losses`. Each time a row is read, torch's generator draws one of its
    positives, so epochs differ and equal seeds give equal draws. Labels with equal texts count as one label. A label
    with several texts is represented by a text drawn each time; if a batch has two of them, the first one is scored.
    Queries without labels are left out, and a warning counts them.

    Args:
        queries: Queries with the columns ``text`` and ``label_ids``, as in :class:`hf_xmc.XMCData`.
        labels: Label texts, or a data set with a column ``text`` and optionally ``uid``. Rows with the same ``uid`` are
            one label with several texts.
        hard_negatives: Label ids ``(N, H)`` of hard negatives, padded with -100. Positives of a query are ignored.
        positives: Form of the column ``label``. ``"padded"``: all positives, padded to the longest row, for the stock
            collator. ``"ragged"``: all positives, for :class:`InBatchCollator`. ``"row"``: the row number of the query,
            for a loss with ``relevance=relevance_matrix(queries, labels)``, which is shortest for many positives.

    Raises:
        ValueError: if a column or a value of queries or labels is invalid (the message names row and column), or the
            arguments do not match.
    """
    if positives not in POSITIVES:
        raise ValueError(f"`positives` must be one of {', '.join(POSITIVES)}, got {positives!r}.")
    queries = as_dataset(queries, "queries")
    if hard_negatives is not None and len(hard_negatives) != len(queries):
        raise ValueError(f"`hard_negatives` must have {len(queries)} rows, one per query, got {len(hard_negatives)}.")
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
                f"`hard_negatives` must be integers of shape (N, H), got {hard_negatives.dtype} of shape "
                f"{hard_negatives.shape}. `mine_hard_negatives` returns such an array."
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

    It is a class, and not a nested function, so that data loaders can send it to spawned worker processes.
    """

    texts: list[list[str]]  # of each label
    width: int  # of the padded positives
    names_row: bool  # whether `label` begins with the row instead of ending with the positives

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
    """Return the argument ``prompts`` of the stock trainer for the columns of :func:`in_batch_dataset`.

    With it, texts are embedded as in ``encode_query`` and ``encode_document``. The stock trainer does not add the
    encoder's prompts by itself, and does not apply ``truncate_dim``.

    Args:
        encoder: The encoder. A query takes its prompt for queries, and a label its prompt for documents.
        num_negatives: The number of columns ``negative_1`` and so on.

    >>> args = SentenceTransformerTrainingArguments("run", prompts=in_batch_prompts(model))  # doctest: +SKIP
    """
    query, document = prompt_of(encoder, "query") or "", prompt_of(encoder, "document") or ""
    negatives = {f"negative_{number}": document for number in range(1, num_negatives + 1)}
    return {"anchor": query, "positive": document, **negatives}


def relevance_matrix(queries: Dataset, labels: Sequence[str] | Dataset) -> sp.csr_array:
    """Return the positives of each query as a matrix ``(N, L)``. Labels with equal texts count as the first of them.

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
    """Return the texts of each label, the first label with the same texts, and the positives of each query.

    The positives are the first labels with their texts.
    """
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
