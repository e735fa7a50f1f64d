"""A memory of training queries: the nearest training queries of a text vote for their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product, takewhile
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hf_xmc.metrics import frequency
from hf_xmc.metrics.ranking import evaluate_ranking
from hf_xmc.search.contract import LabelSearch, visible_labels
from hf_xmc.search.exact import QUERY_BLOCK, LabelIndex, of_recognised
from hf_xmc.search.memory_settings import COMBINED, GRID, METRICS, SURE, MemorySettings
from hf_xmc.search.mixing import Votes, best_mixed, probabilities, votes_of
from hf_xmc.tensors import unit_rows
from hf_xmc.topk import TopK, checked_k


class Neighbors(NamedTuple):
    """The training queries nearest to each query, nearest first."""

    rows: np.ndarray  # (N, n) int64, padded with -1
    cosines: np.ndarray  # (N, n) float32


class TrainingMemory:
    r"""Training queries with known labels, whose votes are mixed with the scores of the labels.

    .. math:: s_l = \log\Big((1 - m)\, \mathrm{softmax}_l(q \cdot y / T) + m \sum_{i \in \text{nearest}} w_i r_{il}\Big)
              - \gamma \log(1 + n_l), \qquad w = \mathrm{softmax}\big(\cos(q, x_i) / t\big)

    The first label is chosen with a :math:`\gamma` of its own, ``settings.first_discount``, and keeps that score. The
    softmax covers the best labels, 200 by default. A label that is not among them has its votes alone. :math:`n_l`
    is the number of queries with label :math:`l` in the memory. Retrieval over training points follows Gupta et al.,
    Dual-Encoders for XMC, ICLR 2024, section 6, and RAE-XMC (arXiv 2502.10615). The discount follows Menon et al.,
    Long-tail learning via logit adjustment, ICLR 2021.

    Args:
        embeddings: ``(M, D)`` embeddings of the queries, from the encoder of the labels. They may have any norm.
        relevance: Sparse ``(M, L)`` matrix. A label is a positive of a query if its value is above 0.
        texts: Texts of the queries, to explain predictions with.
        settings: How votes are counted; see :class:`MemorySettings`.
        index: Function that makes the index of unit embeddings: :class:`hf_xmc.LabelIndex`, or a faster one.

    Raises:
        ValueError: if the numbers of embeddings, rows of ``relevance`` and texts differ.
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
        self.index = index(unit_rows(embeddings))
        self.relevance = _binary(relevance)
        self.texts = None if texts is None else list(texts)
        self.settings = settings or MemorySettings()

    def __len__(self) -> int:
        return self.relevance.shape[0]

    @property
    def relevance(self) -> sp.csr_array:
        """The labels of the queries, a sparse ``(M, L)`` matrix of ones."""
        return self._relevance

    @relevance.setter
    def relevance(self, relevance: sp.csr_array) -> None:
        self._relevance = relevance
        self._log_counts = np.log1p(relevance.sum(0))  # (L,)

    @property
    def num_labels(self) -> int:
        return self.relevance.shape[1]

    def add(self, embeddings: np.ndarray | Tensor, relevance: sp.sparray, texts: Sequence[str] | None = None) -> None:
        """Add queries with known labels, such as documents that arrived after the training. Nothing is trained.

        Raises:
            ValueError: if sizes do not fit, or if only the memory or only the new queries have texts.
        """
        _check_sizes(embeddings, relevance, texts)
        if relevance.shape[1] != self.num_labels or (texts is None) != (self.texts is None):
            raise ValueError(
                f"the memory has {self.num_labels} labels, with{'out' if self.texts is None else ''} texts; got "
                f"{relevance.shape[1]} labels, with{'out' if texts is None else ''} texts."
            )
        more = sp.csr_array(sp.vstack([self.relevance, _binary(relevance)]))
        all_texts = None if self.texts is None or texts is None else [*self.texts, *texts]
        self.index.add(unit_rows(embeddings))  # the last step that can fail
        self.relevance, self.texts = more, all_texts

    def keep_labels(self, label_ids: ArrayLike, num_labels: int) -> None:
        """Renumber the labels: ``label_ids[j]`` becomes ``j``, and labels that are not in the list are removed.

        Further labels, up to ``num_labels``, are new and get no vote.
        """
        kept = sp.csr_array(self.relevance[:, np.asarray(label_ids, dtype=np.int64)])
        self.relevance = sp.csr_array((kept.data, kept.indices, kept.indptr), shape=(len(self), num_labels))

    def nearest(
        self, queries: np.ndarray | Tensor, n: int | None = None, *, silent: np.ndarray | None = None
    ) -> Neighbors:
        """Return the ``n`` training queries with the largest cosine similarity.

        Args:
            queries: ``(N, D)``, of any norm.
            n: Number of training queries; by default the number that votes.
            silent: ``(M, 2)`` pairs (row of the query, row of the memory) to leave out.
        """
        queries = torch.nn.functional.normalize(torch.as_tensor(queries).float())
        return Neighbors(*self.index.search(queries, n or self.settings.neighbors, exclude=silent))

    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int,
        labels: LabelSearch,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
        silent: np.ndarray | None = None,
    ) -> TopK:
        """Return the ``k`` labels with the best mixed scores.

        Args:
            queries: ``(N, D)``.
            k: Number of labels.
            labels: Index of the labels.
            exclude, allow, deny: As in :meth:`hf_xmc.LabelIndex.search`. Hidden labels are not in the softmax either.
            silent: ``(M, 2)`` pairs (row of the query, row of the memory) that do not vote.

        Raises:
            ValueError: if the index has another number of labels than the memory, or refuses an argument.
        """
        if labels.num_labels != self.num_labels:
            raise ValueError(
                f"`labels` must have the {self.num_labels} labels of the memory, got an index of {labels.num_labels}."
            )
        queries, k = torch.as_tensor(queries).float(), checked_k(k)
        allow, deny = (None if ids is None else list(ids) for ids in (allow, deny))
        found = labels.search(queries, max(k, self.settings.candidates), exclude=exclude, allow=allow, deny=deny)
        pairs = np.empty((0, 2), np.int64) if exclude is None else np.asarray(exclude, np.int64).reshape(-1, 2)
        visible = visible_labels(self.num_labels, allow, deny)
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
        penalty, of_first = settings.discount * self._log_counts, settings.discount_of_first * self._log_counts
        blocks = [TopK.empty(0, k)]
        for start in range(0, len(labels.label_ids), QUERY_BLOCK):
            here = slice(start, start + QUERY_BLOCK)
            found, known = TopK(*(part[here] for part in labels)), Neighbors(*(part[here] for part in nearest))
            own = probabilities(found, settings.label_temperature, settings.candidates)
            rows = known.rows[:, : settings.neighbors]
            votes = votes_of(rows, self.weights(known, settings), self.relevance)
            if visible is not None:
                votes = Votes(*(part[visible[votes.label_ids]] for part in votes))
            hidden = pairs[(start <= pairs[:, 0]) & (pairs[:, 0] < start + QUERY_BLOCK)] - [start, 0]
            blocks.append(best_mixed(found.label_ids, own, votes, hidden, settings.mix, penalty, of_first, k))
        return TopK(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    def weights(self, nearest: Neighbors, settings: MemorySettings) -> np.ndarray:
        """Return the ``(N, n)`` weights of the votes of the first ``n = settings.neighbors`` neighbors.

        They sum to 1 for each query.
        """
        cosines = nearest.cosines[:, : settings.neighbors]
        largest = np.where(np.isneginf(cosines[:, :1]), 0, cosines[:, :1])  # without a neighbor there is no vote
        weights = np.exp((cosines - largest).astype(np.float64) / settings.temperature)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1)
        weights[cosines == 0] = 0  # a query without a known word has no neighbor
        return weights

    def tune(
        self,
        queries: np.ndarray | Tensor,
        relevance: sp.csr_array,
        labels: LabelSearch,
        *,
        metric: str = "nDCG@5",
        inverse_propensity: ArrayLike | None = None,
        tolerance: float = 0.0,
        exclude: np.ndarray | None = None,
        silent: np.ndarray | None = None,
    ) -> dict[str, Any]:
        r"""Choose the settings that are best on validation queries, which should not vote for themselves.

        Settings are tried one after the other, in two rounds. With a tolerance, combinations of all settings
        are then tried, except for the discount of the first label. The searches are done only once. A setting is only
        changed if the metric rises by more than :math:`1 / N`, as if a wrong query became right, so that few queries
        change little.

        Args:
            queries: ``(N, D)`` embeddings of the validation queries.
            relevance: Their sparse ``(N, L)`` positives.
            labels: Index of the labels.
            metric: One of ``METRICS``. ``"P@5"`` ignores the order of the labels, and ``"PSP@5"`` favors rare labels.
            inverse_propensity: ``(L,)``, for PSP; by default computed from the queries of the memory.
            tolerance: How much of the metric, and of P@1, may be lost to raise PSP@5. With fewer than 1,000 queries, a
                fraction of it, because the loss is less certain.
            exclude: ``(M, 2)`` filter pairs.
            silent: ``(M, 2)`` pairs (row of the query, row of the memory) that do not vote, such as those of
                :func:`hf_xmc.search.overlap.equal_embeddings`.

        Returns:
            The settings, and under ``validation`` the metrics that they reach.

        Raises:
            ValueError: if the metric is unknown, no query has a positive, or PSP is needed and the memory has fewer
                than 3 queries.
        """
        if metric not in METRICS:
            raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, got {metric!r}.")
        if inverse_propensity is None and (tolerance or metric.startswith("PSP")):
            inverse_propensity = frequency.inverse_propensity(frequency.label_counts(self.relevance), len(self))
        queries = torch.as_tensor(queries).float()
        found = of_recognised(labels.search(queries, self.settings.candidates, exclude=exclude), queries)
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

        def better(settings: Iterable[MemorySettings], name: str) -> MemorySettings:
            top = max(settings, key=lambda settings: measured(settings)[name])
            return top if measured(top)[name] > measured(best)[name] + margin else best

        num_labelled = int(np.count_nonzero(np.diff(relevance.indptr)))
        best, margin = self.settings, 1 / max(1, num_labelled)
        for _ in range(2):
            for name, values in GRID.items():
                best = better((replace(best, **{name: value}) for value in values), metric)
        if tolerance:  # how much a discount costs depends on all other settings
            loss = tolerance * min(1, num_labelled / SURE)
            least = {name: measured(best)[name] - loss for name in (metric, "P@1")}

            def is_enough(settings: MemorySettings) -> bool:
                return all(measured(settings)[name] >= value for name, value in least.items())

            enough = [best]
            for values in product(*(sorted({*some, getattr(best, name)}) for name, some in COMBINED.items())):
                near = replace(best, **dict(zip(COMBINED, values, strict=True)))
                enough += takewhile(is_enough, (replace(near, discount=gamma) for gamma in GRID["discount"]))
            best = better(enough, "PSP@5")
        reached = measured(best)
        self.settings = best = replace(best, first_discount=best.discount_of_first)
        return {**asdict(best), "validation": reached}


def _binary(relevance: sp.sparray) -> sp.csr_array:
    relevance = sp.csr_array(relevance, dtype=np.float32, copy=True)
    relevance.data = (relevance.data > 0).astype(np.float32)
    relevance.eliminate_zeros()
    return relevance


def _check_sizes(embeddings: np.ndarray | Tensor, relevance: sp.sparray, texts: Sequence[str] | None) -> None:
    sizes = {len(embeddings), relevance.shape[0]} | (set() if texts is None else {len(texts)})
    if len(sizes) > 1:
        raise ValueError(
            f"a memory needs one embedding, row of relevance and text per query, got {len(embeddings)} embeddings, "
            f"{relevance.shape[0]} rows of relevance{'' if texts is None else f' and {len(texts)} texts'}."
        )
