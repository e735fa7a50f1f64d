"""Retrieval over the training queries in addition to the labels: labels of the nearest training queries vote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hf_xmc.metrics import frequency
from hf_xmc.metrics.ranking import evaluate_ranking
from hf_xmc.search.exact import QUERY_BLOCK, LabelIndex, of_recognised
from hf_xmc.search.memory_settings import GRID, METRICS, MemorySettings
from hf_xmc.tensors import unit
from hf_xmc.topk import TopK, checked_k

CANDIDATES = 200  # labels that take part by their own score; the others need a vote


class Neighbors(NamedTuple):
    """The training queries nearest to each query, nearest first."""

    rows: np.ndarray  # (N, n) int64, -1 where there are fewer
    cosines: np.ndarray  # (N, n) float32


class TrainingMemory:
    r"""Training queries with their labels, whose votes are mixed with the scores of the labels.

    .. math:: s_l = \log\Big((1 - m)\, \mathrm{softmax}_l(q \cdot y / T) + m \sum_{i \in \text{nearest}} w_i r_{il}\Big)
              - \gamma \log(1 + n_l), \qquad w = \mathrm{softmax}\big(\cos(q, x_i) / t\big)

    Over the 200 best labels and all that get a vote; :math:`n_l` counts the memory's queries of a label. Retrieval over
    training points: Gupta et al., Dual-Encoders for XMC, ICLR 2024, section 6, and RAE-XMC (arXiv 2502.10615). The
    discount: Menon et al., Long-tail learning via logit adjustment, ICLR 2021.

    Args:
        embeddings: ``(M, D)``, of the queries, made by the encoder of the labels. Their length does not matter.
        relevance: sparse ``(M, L)``; a value above 0 makes the label a positive.
        texts: those of the queries, to explain predictions by.
        settings: see :class:`MemorySettings`.
        index: makes the index that finds the nearest, of unit embeddings: :class:`hf_xmc.LabelIndex` or a faster one.

    Raises:
        ValueError: if sizes do not fit.
    """

    def __init__(
        self,
        embeddings: np.ndarray | Tensor,
        relevance: sp.sparray,
        texts: Sequence[str] | None = None,
        *,
        settings: MemorySettings | None = None,
        index: Callable[[Tensor], LabelIndex] = LabelIndex,
    ) -> None:
        _check_sizes(embeddings, relevance, texts)
        self.index = index(unit(embeddings))
        self.relevance = _binary(relevance)
        self.texts = None if texts is None else list(texts)
        self.settings = settings or MemorySettings()

    def __len__(self) -> int:
        return self.relevance.shape[0]

    @property
    def num_labels(self) -> int:
        return self.relevance.shape[1]

    def add(self, embeddings: np.ndarray | Tensor, relevance: sp.sparray, texts: Sequence[str] | None = None) -> None:
        """More queries with their labels, such as documents that came after the training; nothing is trained."""
        _check_sizes(embeddings, relevance, texts)
        if relevance.shape[1] != self.num_labels or (texts is None) != (self.texts is None):
            raise ValueError(
                f"the memory is of {self.num_labels} labels, with{'out' if self.texts is None else ''} texts; got "
                f"{relevance.shape[1]} labels, with{'out' if texts is None else ''} texts."
            )
        more = sp.csr_array(sp.vstack([self.relevance, _binary(relevance)]))
        all_texts = None if self.texts is None or texts is None else [*self.texts, *texts]
        self.index.add(unit(embeddings))  # the last step that can fail
        self.relevance, self.texts = more, all_texts

    def keep_labels(self, label_ids: ArrayLike, num_labels: int) -> None:
        """Renumber: label ``label_ids[j]`` becomes ``j``, the others are forgotten, and labels up to ``num_labels`` are
        new, without a vote."""
        kept = sp.csr_array(self.relevance[:, np.asarray(label_ids, dtype=np.int64)])
        self.relevance = sp.csr_array((kept.data, kept.indices, kept.indptr), shape=(len(self), num_labels))

    def nearest(
        self, queries: np.ndarray | Tensor, n: int | None = None, *, silent: np.ndarray | None = None
    ) -> Neighbors:
        """Return the ``n`` training queries of the largest cosine, by default as many as vote.

        ``silent`` are ``(M, 2)`` pairs (row of the query, row of the memory) that are left out.
        """
        queries = torch.nn.functional.normalize(torch.as_tensor(queries).float())
        return Neighbors(*self.index.search(queries, n or self.settings.neighbors, exclude=silent))

    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int,
        labels: LabelIndex,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
        silent: np.ndarray | None = None,
    ) -> TopK:
        """Return the ``k`` labels of the best mixed score; arguments as in :meth:`hf_xmc.LabelIndex.search`.

        Labels that are left out are not in the softmax either. ``silent`` are pairs (row of the query, row of the
        memory) that do not vote.
        """
        if labels.num_labels != self.num_labels:
            raise ValueError(f"the memory is of {self.num_labels} labels, the index of {labels.num_labels}.")
        queries, k = torch.as_tensor(queries).float(), checked_k(k)
        allow, deny = (None if ids is None else list(ids) for ids in (allow, deny))
        found = labels.search(queries, max(k, CANDIDATES), exclude=exclude, allow=allow, deny=deny)
        pairs = np.empty((0, 2), np.int64) if exclude is None else np.asarray(exclude, np.int64).reshape(-1, 2)
        visible = labels.visible(allow, deny)
        return self._mixed(found, self.nearest(queries, silent=silent), k, self.settings, pairs, visible)

    def _mixed(
        self,
        labels: TopK,
        nearest: Neighbors,
        k: int,
        settings: MemorySettings,
        pairs: np.ndarray,
        visible: np.ndarray | None,
    ) -> TopK:
        penalty = settings.discount * np.log1p(self.relevance.sum(0))
        hidden = sp.csr_array((np.ones(len(pairs)), pairs.T), shape=(len(labels.label_ids), self.num_labels))
        blocks = [TopK.empty(0, k)]
        for start in range(0, len(labels.label_ids), QUERY_BLOCK):
            here = slice(start, start + QUERY_BLOCK)
            votes = self.votes(Neighbors(*(part[here] for part in nearest)), settings)
            if visible is not None:
                votes.data *= visible[votes.indices]
            votes = votes - votes * (hidden[here] > 0)
            own = probabilities(TopK(*(part[here] for part in labels)), settings.label_temperature, self.num_labels)
            mixed = sp.csr_array((1 - settings.mix) * own + settings.mix * votes)
            mixed.eliminate_zeros()
            mixed.data = np.log(mixed.data) - penalty[mixed.indices]
            blocks.append(_best(mixed, k))
        return TopK(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    def weights(self, nearest: Neighbors, settings: MemorySettings) -> np.ndarray:
        """``(N, n)``, the share of the votes that each neighbor has."""
        cosines = nearest.cosines
        largest = np.where(np.isneginf(cosines[:, :1]), 0, cosines[:, :1])  # if there is no neighbor, nothing votes
        weights = np.exp((cosines - largest).astype(np.float64) / settings.temperature)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1)
        weights[cosines == 0] = 0  # a query without a known word is near to nothing
        return weights

    def votes(self, nearest: Neighbors, settings: MemorySettings) -> sp.csr_array:
        """``(N, L)``, the share of the votes that each label gets."""
        rows, cosines = (part[:, : settings.neighbors] for part in nearest)
        weights = self.weights(Neighbors(rows, cosines), settings)
        real = rows >= 0
        offsets = np.concatenate([[0], real.sum(1).cumsum()])
        table = sp.csr_array((weights[real], rows[real], offsets), shape=(len(rows), len(self)))
        return sp.csr_array(table @ self.relevance)

    def tune(
        self,
        queries: np.ndarray | Tensor,
        relevance: sp.csr_array,
        labels: LabelIndex,
        *,
        metric: str = "nDCG@5",
        inverse_propensity: ArrayLike | None = None,
        tolerance: float = 0.0,
        exclude: np.ndarray | None = None,
        silent: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Choose the settings that are best on validation queries, which should not vote for themselves.

        One setting after the other, twice round; the searches are done once.

        Args:
            queries, relevance: ``(N, D)`` embeddings and sparse ``(N, L)`` positives.
            labels: the index of the labels.
            metric: one of ``METRICS``; ``"P@5"`` does not ask in which order, ``"PSP@5"`` is for rare labels.
            inverse_propensity: ``(L,)``, for PSP; by default that of the memory's queries, as if all were training's.
            tolerance: what of the metric may be given up to raise PSP@5 by the discount alone.
            exclude: filter pairs.
            silent: pairs (row of the query, row of the memory) that do not vote, such as those of
                :func:`hf_xmc.search.overlap.equal_embeddings`.

        Returns the settings with the metrics they reach. Raises ``ValueError`` for another metric, queries without a
        positive, and PSP by a memory of fewer than 3.
        """
        if metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}, got {metric!r}.")
        if inverse_propensity is None and (tolerance or metric.startswith("PSP")):
            inverse_propensity = frequency.inverse_propensity(frequency.label_counts(self.relevance), len(self))
        queries = torch.as_tensor(queries).float()
        found = of_recognised(labels.search(queries, CANDIDATES, exclude=exclude), queries)
        nearest = self.nearest(queries, int(max(GRID["neighbors"])), silent=silent)
        pairs = np.empty((0, 2), np.int64) if exclude is None else np.asarray(exclude, np.int64)
        tried: dict[MemorySettings, dict[str, float]] = {}

        def measured(settings: MemorySettings) -> dict[str, float]:
            if settings not in tried:
                ranked = self._mixed(found, nearest, 10, settings, pairs, None)
                tried[settings] = evaluate_ranking(
                    ranked.label_ids, relevance, inverse_propensity=inverse_propensity, ndcg_at=[5], recall_at=[10]
                )
            return tried[settings]

        best = self.settings
        for _ in range(2):
            for name, values in GRID.items():
                around = [best, *(replace(best, **{name: value}) for value in values)]
                best = max(around, key=lambda settings: measured(settings)[metric])
        if tolerance:
            around = [best, *(replace(best, discount=value) for value in GRID["discount"])]
            enough = [choice for choice in around if measured(choice)[metric] >= measured(best)[metric] - tolerance]
            best = max(enough, key=lambda settings: measured(settings)["PSP@5"])
        self.settings = best
        return {**asdict(best), "validation": measured(best)}


def _binary(relevance: sp.sparray) -> sp.csr_array:
    relevance = sp.csr_array(relevance, dtype=np.float32, copy=True)
    relevance.data = (relevance.data > 0).astype(np.float32)
    relevance.eliminate_zeros()
    return relevance


def _check_sizes(embeddings: np.ndarray | Tensor, relevance: sp.sparray, texts: Sequence[str] | None) -> None:
    sizes = {len(embeddings), relevance.shape[0]} | (set() if texts is None else {len(texts)})
    if len(sizes) > 1:
        raise ValueError(
            f"{len(embeddings)} embeddings, {relevance.shape[0]} rows of relevance"
            f"{'' if texts is None else f' and {len(texts)} texts'}: a memory has one of each for a query."
        )


def probabilities(found: TopK, temperature: float, num_labels: int) -> sp.csr_array:
    """``(N, L)``, relative to the best ``CANDIDATES``, so that a label's does not depend on how many are asked for."""
    scaled = found.scores.astype(np.float64) / temperature
    top = scaled[:, :CANDIDATES]
    with np.errstate(invalid="ignore"):
        shares = np.exp(scaled - scaled[:, :1]) / np.exp(top - top[:, :1]).sum(1, keepdims=True)
    real = found.label_ids >= 0
    offsets = np.concatenate([[0], real.sum(1).cumsum()])
    # The smallest positive number keeps labels far behind the best among the candidates.
    values = np.maximum(shares[real], np.finfo(np.float64).tiny)
    return sp.csr_array((values, found.label_ids[real], offsets), shape=(len(scaled), num_labels))


def _best(scores: sp.csr_array, k: int) -> TopK:
    """The ``k`` largest entries of each row; of equal scores the smaller label id comes first."""
    num_rows = scores.shape[0]
    row = np.repeat(np.arange(num_rows), np.diff(scores.indptr))
    order = np.lexsort((scores.indices, -scores.data, row))
    place = np.arange(len(order)) - scores.indptr[row]
    order, row, place = (part[place < k] for part in (order, row, place))
    best = TopK.empty(num_rows, k)
    best.label_ids[row, place] = scores.indices[order]
    best.scores[row, place] = scores.data[order]
    return best
