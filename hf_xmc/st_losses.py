"""The losses for sentence-transformers' own trainer: any number of positives, none of them ever a negative.

A batch holds queries (first column) and candidates (the other columns: positives, hard negatives). Every candidate of
the batch is scored against every query. What is a positive of which query is told by label ids, so that a label drawn
for one query is no negative of another query that has it too, and a label drawn twice is one candidate.

:func:`in_batch_dataset` makes such batches. All labels as negatives need :class:`hf_xmc.XMCTrainer`: the stock trainer
hands a loss the columns of a batch, and the labels are no column.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from hf_xmc import losses, sharding
from hf_xmc.batching import pad
from hf_xmc.sharding import IGNORE_INDEX

logger = logging.getLogger(__name__)

SIMILARITIES = {cos_sim: "cos_sim", dot_score: "dot_score"}


class _InBatchLoss(CachedLossMixin, nn.Module):
    """One of :mod:`hf_xmc.losses` between the queries and the candidates of a batch.

    Args:
        model: the encoder that is trained.
        temperature: divides the similarities; about 0.05 for cosines, 1 for dot products whose norm is free. It is one
            over the ``scale`` of ``MultipleNegativesRankingLoss``.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``.
        gather_across_devices: score the queries of a process against the candidates of all processes.
        mini_batch_size: texts embedded at a time, with gradient caching; ``None`` for all at once.
        mini_batch_num_tokens: tokens embedded at a time, instead of texts.
        relevance: sparse ``(N, L)``, where batches name the row of a query instead of its positives.

    The column ``label`` holds, a row: the ids of the row's candidates, one for each candidate column (-100 for none),
    then the ids of all the query's positives, in or out of the batch, padded with -100. With ``relevance`` it holds the
    query's row, then the ids of the candidates.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        *,
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        relevance: sp.csr_array | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        if similarity_fct not in SIMILARITIES:
            raise ValueError(
                f"similarity_fct is cos_sim or dot_score of sentence_transformers.util, got {similarity_fct}."
            )
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        if self.uses_gradient_cache and has_static_embedding_input(model):
            raise ValueError(
                "a StaticEmbedding keeps no activations and cannot be split into mini-batches: leave mini_batch_size "
                "and mini_batch_num_tokens at None."
            )
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}.")
        self.model, self.loss, self.similarity_fct = model, loss, similarity_fct
        self.gather_across_devices = gather_across_devices
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.relevance = None if relevance is None else sp.csr_array(relevance)
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The mean over the queries of the batch that have a positive in it."""
        features = list(sentence_features)
        if len(features) < 2:
            raise ValueError(f"expected a column of queries and one or more of candidates, got {len(features)} column.")
        if not self.uses_gradient_cache:
            return self.calculate_loss([[column] for column in embed_columns(self.model, features)], labels)

        learned = list(self.loss.parameters())  # a bias: its gradient comes with the loss, not with an embedding
        before = [parameter.grad for parameter in learned]
        for parameter in learned:
            parameter.grad = None
        loss: Tensor = self.forward_cached(features, labels)
        for parameter, old in zip(learned, before, strict=True):
            cached, parameter.grad = parameter.grad, old
            if cached is not None:
                loss = loss + (parameter - parameter.detach()) * cached  # 0, with the gradient that was cached
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        queries, *candidates = [torch.cat(column) for column in reps]
        ids, known = self._ids_and_positives(labels, len(candidates))
        everything, ids = torch.cat(candidates), ids.T.reshape(-1)
        if self.gather_across_devices:
            everything = sharding.gather_queries(everything)
            ids = sharding.gather_rows(ids[:, None], fill=IGNORE_INDEX)[:, 0]
        if self.similarity_fct is cos_sim:
            queries, everything = F.normalize(queries, dim=-1), F.normalize(everything, dim=-1)
        chosen, positives = match_positives(ids, known)
        loss: Tensor = self.loss(queries, everything[chosen], positives)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _ids_and_positives(self, labels: Tensor | None, num_columns: int) -> tuple[Tensor, Tensor]:
        """Ids of the candidates ``(B, C)`` and of all positives of each query ``(B, P)``."""
        expected = num_columns + 1
        if labels is None or labels.ndim != 2 or labels.shape[1] < expected or labels.is_floating_point():
            got = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                f"{type(self).__name__} needs a column `label` of {expected} or more integers a row: the ids of the "
                f"{num_columns} candidate(s) and of the query's positives; got {got}. "
                "`hf_xmc.st_losses.in_batch_dataset` makes it."
            )
        if self.relevance is None:
            return labels[:, :num_columns], labels[:, num_columns:]
        rows = labels[:, 0].cpu().numpy()
        if labels.shape[1] != expected or rows.min() < 0 or rows.max() >= self.relevance.shape[0]:
            raise ValueError(
                f"with relevance, `label` holds {expected} numbers a row, the first of them a row below "
                f"{self.relevance.shape[0]}; got {labels.shape[1]} numbers, rows up to {rows.max()}."
            )
        offsets, indices = self.relevance.indptr, self.relevance.indices
        return labels[:, 1:], pad([indices[offsets[row] : offsets[row + 1]] for row in rows]).to(labels.device)

    def get_config_dict(self) -> dict[str, Any]:
        config = {
            **self.loss.get_config_dict(),  # type: ignore[operator]
            "similarity_fct": SIMILARITIES[self.similarity_fct],
            "gather_across_devices": self.gather_across_devices,
        }
        if self.uses_gradient_cache:
            config |= {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return config

    @property
    def citation(self) -> str:
        return """
@inproceedings{gupta2024dualencoders,
    title = {Dual-Encoders for Extreme Multi-Label Classification},
    author = {Gupta, Nilesh and Khatri, Devvrit and Rawat, Ankit S. and Bhojanapalli, Srinadh and Jain, Prateek and
              Dhillon, Inderjit S.},
    booktitle = {International Conference on Learning Representations},
    year = {2024},
    url = {https://arxiv.org/abs/2310.10636},
}
"""


class DecoupledSoftmaxLoss(_InBatchLoss):
    """:func:`hf_xmc.functional.decoupled_softmax_loss` within a batch; arguments as in the base class."""

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(model, losses.DecoupledSoftmaxLoss(temperature), **kwargs)


class SoftmaxLoss(_InBatchLoss):
    """:func:`hf_xmc.functional.softmax_loss` within a batch; arguments as in the base class."""

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(model, losses.SoftmaxLoss(temperature), **kwargs)


class SoftTopKLoss(_InBatchLoss):
    """:func:`hf_xmc.functional.soft_top_k_loss` within a batch; ``k`` counts among the batch's candidates."""

    def __init__(
        self, model: SentenceTransformer, k: float = 5, alpha: float = 1.0, temperature: float = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(model, losses.SoftTopKLoss(k, alpha, temperature), **kwargs)


class BCELoss(_InBatchLoss):
    """:func:`hf_xmc.functional.bce_loss` within a batch, with a learned bias and scale."""

    def __init__(
        self, model: SentenceTransformer, bias: float | None = -10.0, temperature: float = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(model, losses.BCELoss(bias, temperature), **kwargs)


def match_positives(ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates to keep, one for each id, and the positives of each query as places among them.

    Args:
        ids: ``(C,)``, the label id of each candidate, -100 for one to leave out.
        known: ``(B, P)``, all positives of each query, padded with -100.

    >>> chosen, positives = match_positives(torch.tensor([7, 4, 7, -100]), torch.tensor([[7, 9], [4, 7]]))
    >>> chosen  # label 4, label 7
    tensor([1, 0])
    >>> positives  # label 9 is not in the batch
    tensor([[   1, -100],
            [   0,    1]])
    """
    unique, inverse = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(unique, len(ids)).scatter_reduce(0, inverse, places, "amin")
    first, unique = first[unique != IGNORE_INDEX], unique[unique != IGNORE_INDEX]
    if not len(unique):
        raise ValueError("the batch has no candidate: every candidate's id is -100.")
    place = torch.searchsorted(unique, known.contiguous()).clamp(max=len(unique) - 1)
    return first, torch.where(unique[place] == known, place, IGNORE_INDEX)


def in_batch_dataset(
    queries: Dataset, labels: Sequence[str] | Dataset, *, hard_negatives: np.ndarray | None = None, ragged: bool = False
) -> Dataset:
    """Columns ``anchor``, ``positive``, ``negative_1`` ..., ``label`` for the losses of this module.

    Every time a row is read, one of its positives is drawn, by torch's generator: another one each epoch, the same ones
    for the same seed. Labels with equal texts count as one label. Queries without labels cannot be drawn for and are
    left out, with a line in the log that counts them.

    Args:
        queries: columns ``text`` and ``label_ids``, as in :class:`hf_xmc.XMCData`.
        labels: label texts, or a data set with a column ``text``.
        hard_negatives: ``(N, H)`` label ids a query, -100 for none. One that is a positive of its query is not used.
        ragged: leave the positives as long as they are, for :class:`InBatchCollator`, instead of padding them all to
            the longest for the stock collator.
    """
    texts = list(labels["text"] if isinstance(labels, Dataset) else labels)
    first_of = {text: label for label, text in reversed(list(enumerate(texts)))}
    canonical = np.array([first_of[text] for text in texts])
    positives = [sorted(set(canonical[ids].tolist())) if len(ids) else [] for ids in queries["label_ids"]]
    if hard_negatives is not None and len(hard_negatives) != len(queries):
        raise ValueError(f"hard_negatives has {len(hard_negatives)} rows, and there are {len(queries)} queries.")
    kept = [row for row, ids in enumerate(positives) if ids]
    if len(kept) < len(queries):
        logger.warning("%d of %d queries have no label and are left out.", len(queries) - len(kept), len(queries))
    columns: dict[str, Any] = {"anchor": queries.select(kept)["text"][:], "positives": [positives[row] for row in kept]}
    if hard_negatives is not None:
        negatives = np.where(hard_negatives >= 0, canonical[hard_negatives], IGNORE_INDEX)[kept]
        for row, ids in enumerate(columns["positives"]):
            negatives[row, np.isin(negatives[row], ids)] = IGNORE_INDEX
        columns["negatives"] = negatives.tolist()
    width = 0 if ragged else max(map(len, columns["positives"]), default=0)

    def draw(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        drawn = [ids[int(torch.randint(len(ids), ()))] for ids in batch["positives"]]
        out: dict[str, list[Any]] = {"anchor": batch["anchor"], "positive": [texts[label] for label in drawn]}
        others = batch.get("negatives") or [[] for _ in drawn]
        for number, column in enumerate(zip(*others, strict=True), start=1):
            out[f"negative_{number}"] = [texts[label] if label >= 0 else "" for label in column]
        out["label"] = [
            [label, *negatives, *ids, *[IGNORE_INDEX] * (width - len(ids))]
            for label, negatives, ids in zip(drawn, others, batch["positives"], strict=True)
        ]
        return out

    return Dataset.from_dict(columns).with_transform(draw)


@dataclass
class InBatchCollator(BaseDataCollator):
    """The stock collator, for a column ``label`` whose rows differ in length."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        label = pad([row["label"] for row in features])
        return super().__call__([{**row, "label": ids} for row, ids in zip(features, label, strict=True)])
