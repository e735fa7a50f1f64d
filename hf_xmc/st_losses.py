"""The losses for sentence-transformers' own trainer: any number of positives, none of them ever a negative.

A batch holds queries (first column) and candidates (the other columns: positives, hard negatives). Every candidate of
the batch is scored against every query. What is a positive of which query is told by label ids, so that a label drawn
for one query is no negative of another query that has it too, and a label drawn twice is one candidate.

:func:`hf_xmc.in_batch_dataset` makes such batches. All labels as negatives need :class:`hf_xmc.XMCTrainer`: the stock
trainer hands a loss the columns of a batch, and the labels are no column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from hf_xmc import distributed, losses
from hf_xmc.losses import functional
from hf_xmc.losses.modules import EmbeddingLoss
from hf_xmc.padding import IGNORE_INDEX, pad

STREAMED = (cos_sim, dot_score)  # similarities that are a dot product, which need no score matrix


class _InBatchLoss(CachedLossMixin, nn.Module):
    """One of :mod:`hf_xmc.losses` between the queries and the candidates of a batch.

    Args:
        model: the encoder that is trained.
        temperature: divides the similarities; about 0.05 for cosines, 1 for dot products whose norm is free. It is one
            over the ``scale`` of ``MultipleNegativesRankingLoss``.
        similarity_fct: of ``(B, D)`` and ``(C, D)``, as in ``sentence_transformers.util``. With ``cos_sim`` and
            ``dot_score`` the score matrix is never held; with any other it is.
        gather_across_devices: score the queries of a process against the candidates of all processes.
        mini_batch_size: texts embedded at a time, with gradient caching; ``None`` for all at once.
        mini_batch_num_tokens: tokens embedded at a time, instead of texts.
        relevance: sparse ``(N, L)``, where batches name the row of a query instead of its positives; see
            :func:`hf_xmc.relevance_matrix`.

    The column ``label`` holds, a row: the ids of the row's candidates, one for each candidate column (-100 for none),
    then the ids of all the query's positives, in or out of the batch, padded with -100. With ``relevance`` it holds the
    query's row, then the ids of the candidates.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: EmbeddingLoss,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        *,
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        relevance: sp.csr_array | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        if not callable(similarity_fct):
            raise ValueError(
                f"similarity_fct is a function such as those of sentence_transformers.util, got {similarity_fct!r}."
            )
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        if self.uses_gradient_cache and has_static_embedding_input(model):
            raise ValueError(
                "a StaticEmbedding keeps no activations and cannot be split into mini-batches: leave mini_batch_size "
                "and mini_batch_num_tokens at None."
            )
        for what, size in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if size is not None and size < 1:
                raise ValueError(f"{what} must be at least 1, got {size}.")
        self.model, self.similarity_fct = model, similarity_fct
        self.loss: EmbeddingLoss = loss
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
            everything = distributed.gather_queries(everything)
            ids = distributed.gather_rows(ids[:, None], fill=IGNORE_INDEX)[:, 0]
        chosen, positives = match_positives(ids, known)
        loss = self._loss_of(queries, everything[chosen], positives)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _loss_of(self, queries: Tensor, candidates: Tensor, positives: Tensor) -> Tensor:
        loss: Tensor
        if self.similarity_fct in STREAMED:
            if self.similarity_fct is cos_sim:
                queries, candidates = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
            loss = self.loss(queries, candidates, positives)
        else:
            formula = getattr(functional, self.loss.function.__name__)  # the same, on a score matrix
            scores = self.similarity_fct(queries, candidates) / self.loss.temperature
            loss = formula(scores, positives, **self.loss.settings())
        return loss

    def _ids_and_positives(self, labels: Tensor | None, num_columns: int) -> tuple[Tensor, Tensor]:
        """Ids of the candidates ``(B, C)`` and of all positives of each query ``(B, P)``."""
        expected = num_columns + 1
        if labels is None or labels.ndim != 2 or labels.shape[1] < expected or labels.is_floating_point():
            got = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                f"{type(self).__name__} needs a column `label` of {expected} or more integers a row: the ids of the "
                f"{num_columns} candidate(s) and of the query's positives; got {got}. "
                "`hf_xmc.in_batch_dataset` makes it."
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
            **self.loss.get_config_dict(),
            "similarity_fct": getattr(self.similarity_fct, "__name__", str(self.similarity_fct)),
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
    """:func:`hf_xmc.losses.functional.decoupled_softmax_loss` within a batch; arguments as in the base class."""

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(model, losses.DecoupledSoftmaxLoss(temperature), **kwargs)


class SoftmaxLoss(_InBatchLoss):
    """:func:`hf_xmc.losses.functional.softmax_loss` within a batch; arguments as in the base class."""

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(model, losses.SoftmaxLoss(temperature), **kwargs)


class SoftTopKLoss(_InBatchLoss):
    """:func:`hf_xmc.losses.functional.soft_top_k_loss` within a batch; ``k`` counts among the batch's candidates."""

    def __init__(
        self, model: SentenceTransformer, k: float = 5, alpha: float = 1.0, temperature: float = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(model, losses.SoftTopKLoss(k, alpha, temperature), **kwargs)


class BCELoss(_InBatchLoss):
    """:func:`hf_xmc.losses.functional.bce_loss` within a batch, with a learned bias and scale."""

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
