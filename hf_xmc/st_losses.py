"""Losses for the stock sentence-transformers trainer: any number of positives, and no positive is ever a negative.

A batch holds queries in its first column and candidates in the others: positives and hard negatives. Every candidate
of the batch is scored against every query. Label ids tell which candidates are positives of which query. So a label
that was drawn for one query is not a negative of another query that has it too, and a label drawn twice is one
candidate.

:func:`hf_xmc.in_batch_dataset` makes such batches. To use all labels as negatives, use :class:`hf_xmc.XMCTrainer`
with the losses of the same names in :mod:`hf_xmc.losses`. The stock trainer passes a loss only the columns of the
batch, and the full label set is not one of them.

>>> from hf_xmc import static_encoder
>>> DecoupledSoftmaxLoss(static_encoder(["red boat", "blue boat"], embedding_dim=2)).loss
DecoupledSoftmaxLoss(temperature=0.05)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from hf_xmc import distributed, losses
from hf_xmc.encoders import roles
from hf_xmc.losses.modules import EmbeddingLoss, set_default_temperature
from hf_xmc.padding import IGNORE_INDEX, pad

STREAMED = (cos_sim, dot_score)  # dot products, which need no score matrix
Encoder: TypeAlias = SentenceTransformer | None  # None is refused with a message that names the right loss


class InBatchLoss(CachedLossMixin, nn.Module):
    """A loss of :mod:`hf_xmc.losses` between the queries and the candidates of a batch.

    Args:
        model: The encoder that is trained; required.
        loss: The loss of embeddings.
        similarity_fct: Function of ``(B, D)`` and ``(C, D)``, as in ``sentence_transformers.util``. The score matrix
            is stored only if it is neither ``cos_sim`` nor ``dot_score``.
        gather_across_devices: Whether to score the queries of a process against the candidates of all processes.
        mini_batch_size: Number of texts to embed at a time, with gradient caching; ``None`` for all at once.
        mini_batch_num_tokens: Number of tokens to embed at a time, instead of a number of texts.
        relevance: Sparse ``(N, L)`` matrix, if batches hold the row number of a query instead of its positives. See
            :func:`hf_xmc.relevance_matrix`.
        show_progress_bar: Whether to show the progress of gradient caching.

    Raises:
        ValueError: if an argument is missing or invalid.

    The four losses below take a ``temperature`` that divides the similarities, one over the ``scale`` of
    ``MultipleNegativesRankingLoss``. By default it is 0.05 for cosines, that is, with ``cos_sim`` or an encoder that
    normalises its embeddings, and 1 for any other similarity.

    The column ``label`` holds, in each row, the ids of the row's candidates, one per candidate column (-100 for none).
    After these it holds the ids of all positives of the query, in the batch or not, padded with -100. With
    ``relevance`` it holds the row number of the query, and then the ids of the candidates.
    """

    def __init__(
        self,
        model: Encoder,
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
        if not isinstance(model, SentenceTransformer):
            name = type(loss).__name__
            raise ValueError(
                f"`model` of hf_xmc.st_losses.{name} must be the encoder to train, got {model!r}. For XMCTrainer use "
                f"hf_xmc.losses.{name}()."
            )
        if not callable(similarity_fct):
            raise ValueError(
                "`similarity_fct` must be a function, such as sentence_transformers.util.cos_sim, got "
                f"{similarity_fct!r}."
            )
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        if self.uses_gradient_cache and has_static_embedding_input(model):
            raise ValueError(
                "mini_batch_size and mini_batch_num_tokens must be None for a StaticEmbedding, which stores no "
                "activations and cannot be split into mini-batches."
            )
        for what, size in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if size is not None and size < 1:
                raise ValueError(f"{what} must be at least 1, got {size}.")
        self.model, self.similarity_fct = model, similarity_fct
        self.loss: EmbeddingLoss = loss
        set_default_temperature(loss, cosines=similarity_fct is cos_sim or roles.normalises(model))
        self.gather_across_devices = gather_across_devices
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.relevance = None if relevance is None else sp.csr_array(relevance)
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Return the mean loss over the queries that have a positive in the batch."""
        features = list(sentence_features)
        if len(features) < 2:
            raise ValueError(
                f"a batch must have one column of queries and at least one of candidates, got {len(features)} column."
            )
        if not self.uses_gradient_cache:
            return self.calculate_loss([[column] for column in embed_columns(self.model, features)], labels)

        learned = list(self.loss.parameters())  # such as a bias, whose gradient does not come through an embedding
        before = [parameter.grad for parameter in learned]
        for parameter in learned:
            parameter.grad = None
        loss: Tensor = self.forward_cached(features, labels)
        for parameter, old in zip(learned, before, strict=True):
            cached, parameter.grad = parameter.grad, old
            if cached is not None:
                loss = loss + (parameter - parameter.detach()) * cached  # adds 0, with the cached gradient
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        queries, *candidates = [torch.cat(column) for column in reps]
        ids, known = self._ids_and_positives(labels, len(candidates))
        embeddings, ids = torch.cat(candidates), ids.T.reshape(-1)
        if self.gather_across_devices:
            embeddings = distributed.gather_queries(embeddings)
            ids = distributed.gather_rows(ids[:, None], fill=IGNORE_INDEX)[:, 0]
        chosen, positives = match_positives(ids, known)
        loss = self._loss_of(queries, embeddings[chosen], positives)
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
            scores = self.similarity_fct(queries, candidates) / self.loss.temperature
            loss = self.loss.dense(scores, positives, **self.loss.settings())
        return loss

    def _ids_and_positives(self, labels: Tensor | None, num_columns: int) -> tuple[Tensor, Tensor]:
        """Return the ids of the candidates, ``(B, C)``, and of all positives of each query, ``(B, P)``."""
        expected = num_columns + 1
        if labels is None or labels.ndim != 2 or labels.shape[1] < expected or labels.is_floating_point():
            got = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                f"`label` must be a column of at least {expected} integers per row, the ids of the {num_columns} "
                f"candidate(s) and of the query's positives, got {got}. Use `hf_xmc.in_batch_dataset`."
            )
        if self.relevance is None:
            return labels[:, :num_columns], labels[:, num_columns:]
        rows = labels[:, 0].cpu().numpy()
        if labels.shape[1] != expected or rows.min() < 0 or rows.max() >= self.relevance.shape[0]:
            raise ValueError(
                f"`label` must hold {expected} numbers per row if `relevance` is given, the first one a row number "
                f"below {self.relevance.shape[0]}, got {labels.shape[1]} numbers and row numbers up to {rows.max()}."
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


class DecoupledSoftmaxLoss(InBatchLoss):
    """The in-batch :func:`~hf_xmc.losses.functional.decoupled_softmax_loss`; arguments of :class:`InBatchLoss`."""

    def __init__(self, model: Encoder = None, temperature: float | None = None, **kwargs: Any) -> None:
        super().__init__(model, losses.DecoupledSoftmaxLoss(temperature), **kwargs)


class SoftmaxLoss(InBatchLoss):
    """The in-batch :func:`~hf_xmc.losses.functional.softmax_loss`; arguments of :class:`InBatchLoss`."""

    def __init__(self, model: Encoder = None, temperature: float | None = None, **kwargs: Any) -> None:
        super().__init__(model, losses.SoftmaxLoss(temperature), **kwargs)


class SoftTopKLoss(InBatchLoss):
    """The in-batch :func:`~hf_xmc.losses.functional.soft_top_k_loss`; ``k`` counts candidates of the batch."""

    def __init__(
        self, model: Encoder = None, k: float = 5, alpha: float = 1.0, temperature: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, losses.SoftTopKLoss(k, alpha, temperature), **kwargs)


class BCELoss(InBatchLoss):
    """The in-batch :func:`~hf_xmc.losses.functional.bce_loss`, with a learned bias and scale."""

    def __init__(
        self, model: Encoder = None, bias: float | None = -10.0, temperature: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, losses.BCELoss(bias, temperature), **kwargs)


def match_positives(ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the candidates to keep, one per label id, and the positives of each query as positions among them.

    Args:
        ids: ``(C,)`` label id of each candidate, -100 for one to ignore.
        known: ``(B, P)`` all positives of each query, padded with -100.

    Raises:
        ValueError: if every candidate is ignored.

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
        raise ValueError("`label` must name at least one candidate of the batch, but every id is -100.")
    place = torch.searchsorted(unique, known.contiguous()).clamp(max=len(unique) - 1)
    return first, torch.where(unique[place] == known, place, IGNORE_INDEX)
