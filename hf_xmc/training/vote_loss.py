"""A loss for the votes of the memory: training queries with the same labels should be near each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_xmc import distributed
from hf_xmc.data.positives import positives_of
from hf_xmc.encoders.forward import ROLE, Features
from hf_xmc.losses.soft_top_k import at_least_float32
from hf_xmc.padding import IGNORE_INDEX
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.batching import ranges
from hf_xmc.training.gradient_cache import embed_in_chunks
from hf_xmc.training.negatives import BatchQueries

FeaturesOf = Callable[[Sequence[str], Sequence[dict[str, int]]], Features]

TEMPERATURE = 0.07  # of the cosines
SHARED = 2  # a label that more queries of the batch are expected to have needs no further queries


def make_vote_loss(
    encoder: SentenceTransformer,
    queries: Dataset,
    num_labels: int,
    collator: Any,
    loss: nn.Module,
    args: XMCTrainingArguments,
) -> VoteLoss | None:
    """Return the loss of votes of a training, or ``None`` if ``args.vote_loss`` is 0.

    Args:
        encoder: The encoder. A static one embeds all drawn queries at once, which takes little memory.
        queries: The training queries.
        num_labels: Number of labels.
        collator: The collator of the training.
        loss: The loss of the labels, in whose precision embeddings are multiplied.
        args: The training arguments.
    """
    if not args.vote_loss:
        return None
    dtype = getattr(getattr(loss, "options", None), "score_dtype", None)
    drawn, batch_size = args.vote_queries, args.per_device_train_batch_size or 1
    chunk_size = max(drawn, batch_size) if isinstance(encoder[0], StaticEmbedding) else batch_size
    return VoteLoss(queries, num_labels, collator.features_of, drawn, chunk_size, dtype)


class VoteLoss:
    r"""The mean over the queries, and over their positives, of the negative logarithm of the votes for a positive.

    .. math:: -\frac{1}{\sum_p w_p} \sum_{p \in P} w_p \log \sum_{j \ne q} v_j r_{jp}, \qquad
              v = \mathrm{softmax}_j\big(\cos(q, x_j) / 0.07\big)

    :math:`r_{jp}` is 1 if query :math:`j` has the label, and 0 otherwise. A query does not vote for itself. The voting
    queries are those of the batch, on all processes, and further training queries that each process draws: for each
    positive of its own queries, one query with the same label, unless the label is frequent enough in the batch. A
    positive that no voting query has does not count. :class:`hf_xmc.TrainingMemory` votes in the same way. (After
    RAE-XMC, arXiv 2502.10615, which has labels and queries in one softmax, and Goldberger et al., Neighbourhood
    Components Analysis, NIPS 2004.)

    Args:
        queries: The training queries.
        num_labels: Number of labels.
        features_of: Function from texts, and rows with their number in ``row``, to the features of the encoder.
        num_drawn: Maximum number of queries to draw in a step.
        chunk_size: Number of drawn queries to embed at a time.
        dtype: Type in which embeddings are multiplied; ``None`` for their own.
    """

    def __init__(
        self,
        queries: Dataset,
        num_labels: int,
        features_of: FeaturesOf,
        num_drawn: int,
        chunk_size: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.texts, self.features_of = queries["text"][:], features_of
        self.num_drawn, self.chunk_size, self.dtype = num_drawn, chunk_size, dtype
        self.offsets, self.label_ids, _ = positives_of(queries, num_labels)
        self.counts = np.bincount(self.label_ids, minlength=num_labels)  # (L,)
        owners = np.repeat(np.arange(len(self.texts)), np.diff(self.offsets))
        self.queries_of = owners[np.argsort(self.label_ids, kind="stable")]  # label after label
        self.starts = self.counts.cumsum() - self.counts

    def __call__(self, encoder: nn.Module, batch: BatchQueries, queries: Tensor) -> Tensor:
        """Return the loss. Its gradient is that of the share of this process's queries.

        Args:
            encoder: The encoder.
            batch: The queries of the step.
            queries: ``(B, D)``, their embeddings with a gradient.
        """
        assert batch.rows is not None  # the queries of a training have rows
        mine = distributed.own_rows(len(batch.rows), queries.device)
        drawn = self.draw(batch.rows.cpu().numpy(), len(queries))
        voting = normalize(torch.cat([queries, self._embed(encoder, drawn, queries.device)]) if len(drawn) else queries)
        factors = voting if self.dtype is None else voting.to(self.dtype)
        scores = at_least_float32(factors[mine] @ factors.T) / TEMPERATURE  # (b, B + n)
        own = torch.arange(len(scores), device=scores.device)
        least = scores.new_tensor(torch.finfo(scores.dtype).min)  # finite, for a query without others
        scores = scores.index_put((own, own + mine.start), least)
        positives, weights = batch.positives[mine], None if batch.weights is None else batch.weights[mine]
        relevance, columns = self._relevance(batch.positives, drawn, positives)
        share = loss_of_votes(scores, relevance, columns, weights) * (len(scores) / len(queries))
        everyone = distributed.gather_rows(share.detach()[None, None]).sum()
        return everyone + (share - share.detach())

    def draw(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Return the rows of further training queries that vote for positives of the queries in ``rows``.

        Random numbers come from torch's CPU generator.

        Args:
            rows: Rows of this process's queries.
            batch_size: Number of queries in the batch, on all processes.
        """
        wanted = self._labels_of(rows)
        wanted = wanted[self.counts[wanted] * batch_size <= SHARED * len(self.texts)]
        places = (torch.rand(len(wanted), dtype=torch.float64).numpy() * self.counts[wanted]).astype(np.int64)
        drawn = np.setdiff1d(self.queries_of[self.starts[wanted] + places], rows)
        if len(drawn) > self.num_drawn:
            drawn = drawn[np.sort(torch.randperm(len(drawn))[: self.num_drawn].numpy())]
        return drawn

    def _embed(self, encoder: nn.Module, rows: np.ndarray, device: torch.device) -> Tensor:
        chunks = []
        for start in range(0, len(rows), self.chunk_size):
            some = rows[start : start + self.chunk_size].tolist()
            features = self.features_of([self.texts[row] for row in some], [{"row": row} for row in some])
            chunks.append({**batch_to_device(features, device), ROLE: "query"})
        return embed_in_chunks(encoder, chunks)

    def _labels_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the labels of training queries, one query after another."""
        return self.label_ids[ranges(self.offsets[:-1], np.diff(self.offsets), rows)]

    def _relevance(self, batch: Tensor, drawn: np.ndarray, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the labels in ``wanted`` the voting queries have.

        Returns:
            A sparse ``(B + n, U)`` matrix of ones, a column for each distinct label, and the column of each entry of
            ``wanted``, ``IGNORE_INDEX`` for padding.
        """
        labels = wanted[wanted >= 0].unique()
        owners = len(batch) + np.repeat(np.arange(len(drawn)), np.diff(self.offsets)[drawn])
        voters = torch.cat([(batch >= 0).nonzero()[:, 0], torch.from_numpy(owners).to(batch.device)])
        named = torch.cat([batch[batch >= 0], torch.from_numpy(self._labels_of(drawn)).to(batch.device)])
        known = torch.isin(named, labels)
        indices = torch.stack([voters[known], torch.searchsorted(labels, named[known])])
        ones = torch.ones(indices.shape[1], device=batch.device)
        size = len(batch) + len(drawn), len(labels)
        relevance = torch.sparse_coo_tensor(indices, ones, size, check_invariants=False)
        columns = torch.where(wanted >= 0, torch.searchsorted(labels, wanted), IGNORE_INDEX)
        return relevance.coalesce(), columns


def loss_of_votes(scores: Tensor, relevance: Tensor, positives: Tensor, importance: Tensor | None = None) -> Tensor:
    r"""Return the mean negative logarithm of the votes for the positives of each query.

    Args:
        scores: ``(B, M)`` scores of the voting queries, minus infinity for those that do not vote.
        relevance: Sparse ``(M, U)`` matrix of ones: the labels of the voting queries.
        positives: ``(B, P)`` columns of ``relevance``, padded with ``IGNORE_INDEX``. Each one occurs once in a row.
        importance: ``(B, P)``, the weight of each positive; ``None`` for 1.

    >>> relevance = torch.tensor([[1., 0.], [1., 1.], [0., 0.]]).to_sparse()
    >>> loss_of_votes(torch.zeros(1, 3), relevance, torch.tensor([[1, -100]])).exp()   # one of three votes for label 1
    tensor(3.)
    """
    rows, places = (positives >= 0).nonzero(as_tuple=True)
    votes = torch.sparse.mm(relevance.t().to(scores.dtype), scores.softmax(1).T)[positives[rows, places], rows]
    weights = torch.ones_like(votes) if importance is None else importance[rows, places].to(votes.dtype)
    weights = weights * (votes > 0)
    sums = votes.new_zeros(len(positives)).index_add(0, rows, weights)
    smallest = torch.finfo(votes.dtype).tiny
    losses = -votes.clamp(min=smallest).log() * weights / sums[rows].clamp(min=smallest)
    return losses.sum() / max(1, len(positives))
