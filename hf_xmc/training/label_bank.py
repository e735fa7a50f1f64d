"""Remembered label embeddings, which propose the labels of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.encoders.forward import embed
from hf_xmc.training.batching import LabelTable, ranges
from hf_xmc.training.gradient_cache import gradient_norms
from hf_xmc.training.negatives import Candidates, Columns, Step, embed_candidates, own_labels
from hf_xmc.training.sampling import inclusion_probabilities, systematic_sample

FLOOR = 1.0  # of the mean importance, added to each: where rows differ in age, an even share of the draws is a hedge


class LabelBank:
    r"""The batch's positives and a sample of the other labels take part, each label standing for :math:`1 / \pi_l`.

    The embeddings of all labels are remembered from when they were last made. The gradient that the loss of the batch
    has at them gives the probability :math:`\pi_l` to be drawn, and serves for nothing else: the labels that take part
    are embedded afresh, and they alone make the loss, whose sums over labels become :math:`\sum_l e^{s_l} / \pi_l`. (A
    fresh score and a remembered one in the same sum do not agree: all embeddings drift together.) Positives of the
    batch have probability 1. Each process draws its share of its own labels.

    What a sample misses at the queries is known of the remembered embeddings :math:`M`, and is added to their gradient
    as a control variate, whose mean is zero and which shrinks the variance the more, the fresher they are:

    .. math:: \nabla_q \ell_S(q, Y_S) + \nabla_q \ell(q, M) - \nabla_q \ell_S(q, M_S)

    What is embedded is remembered, and the rest is renewed in turn, so that no embedding is older than ``max_age``.
    Labels are drawn, and all texts of a label that is drawn take part.

    Args:
        table: the tokenised labels.
        loss: the loss that is trained, one of those that can weigh labels.
        share: Fraction of the labels that are drawn in addition to the batch's positives, in (0, 1].
        max_age: in batches.
        normalised: whether the encoder normalises.
    """

    def __init__(self, table: LabelTable, loss: nn.Module, share: float, max_age: int, normalised: bool) -> None:
        self.table, self.loss, self.share, self.normalised = table, loss, share, normalised
        self.label_ids = own_labels(table)
        self.columns = Columns(self.label_ids, table.device)
        self.rows, self.text_counts = table.rows_of(self.label_ids), table.counts_of(self.label_ids)
        self.num_renewed = math.ceil(len(self.rows) / max_age)
        self.embeddings: Tensor | None = None  # (T / W, D), made at the first step
        self.next = 0  # the row to renew
        self.state_of = distributed.rank()  # each process remembers labels of its own

    @torch.no_grad()
    def select(self, encoder: nn.Module, step: Step) -> Candidates:
        self._renew(encoder)
        assert self.embeddings is not None
        columns = self.columns(step.positives)
        everyone = Candidates(self.label_ids, columns, self.columns.shard, text_counts=self.text_counts)
        at_texts, at_queries = self._gradients(step, self.embeddings, everyone)
        importance = gradient_norms(at_texts, self.embeddings if self.normalised else None)
        if self.text_counts is not None:
            importance = torch.segment_reduce(importance, "sum", lengths=self.text_counts)
        mine = self.columns.shard.localize(columns)
        mine = mine[mine >= 0]
        importance[mine] = 0
        importance += FLOOR * importance.mean()
        importance[mine] = 0  # drawn in any case, in addition to the share
        probabilities = inclusion_probabilities(importance, math.ceil(self.share * len(importance)))
        probabilities[mine] = 1
        drawn = systematic_sample(probabilities)
        label_ids = self.label_ids[drawn.cpu().numpy()]
        chosen = Columns(label_ids, self.table.device)
        sample = Candidates(
            label_ids,
            chosen(step.positives),
            chosen.shard,
            1 / probabilities[drawn],
            text_counts=self.table.counts_of(label_ids),
        )
        _, of_sample = self._gradients(step, self.embeddings[self._rows_of(drawn)], sample)
        return sample._replace(query_gradient=at_queries - of_sample)

    def embed(self, encoder: nn.Module, candidates: Candidates) -> Tensor:
        embeddings = embed_candidates(encoder, self.table, candidates.label_ids)
        assert self.embeddings is not None  # `select` came first
        labels = self.columns(torch.from_numpy(candidates.label_ids).to(embeddings.device)) - self.columns.shard.start
        self.embeddings[self._rows_of(labels)] = embeddings.detach().to(self.embeddings.dtype)
        return embeddings

    def _rows_of(self, labels: Tensor) -> Tensor:
        """Return the rows of the embeddings of labels, which are counted among those of this process."""
        if self.text_counts is None:
            return labels
        counts = self.text_counts.cpu().numpy()
        rows = ranges(counts.cumsum() - counts, counts, labels.cpu().numpy())
        return torch.from_numpy(rows).to(labels.device)

    def _gradients(self, step: Step, texts: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Return those of the loss, at remembered texts and at the queries (this process's part of it)."""
        with torch.enable_grad():
            queries, texts = step.queries.detach().requires_grad_(), texts.detach().requires_grad_()
            loss = candidates.loss(self.loss, queries, texts, step.weights)
        at_texts, at_queries = torch.autograd.grad(loss, [texts, queries])
        return at_texts, at_queries

    def _renew(self, encoder: nn.Module) -> None:
        rows = torch.arange(self.next, self.next + self.num_renewed) % len(self.rows)
        if self.embeddings is None:
            rows = torch.arange(len(self.rows))
        for part, features in self.table.chunks(self.rows[rows.numpy()]):
            embeddings = embed(encoder, features)
            if self.embeddings is None:
                self.embeddings = embeddings.new_empty(len(self.rows), embeddings.shape[1], dtype=torch.bfloat16)
            self.embeddings[rows[part].to(embeddings.device)] = embeddings.to(torch.bfloat16)
        self.next = (self.next + self.num_renewed) % len(self.rows)

    def describe(self, batch: int, positives: float) -> tuple[float, str]:
        """Labels scored a step, at most, and what a process does with them."""
        labels = self.table.num_labels
        number = self.share * labels + min(batch * positives, (1 - self.share) * labels)
        mine = number / distributed.world_size()
        return number, f"embeds up to {mine:.0f} labels a step, and {self.num_renewed} {self.table.unit} to remember"

    def state_dict(self) -> dict[str, Tensor]:
        assert self.embeddings is not None
        return {"embeddings": self.embeddings, "next": torch.tensor(self.next)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if len(state["embeddings"]) != len(self.rows):
            raise ValueError(
                f"the checkpoint's label bank holds {len(state['embeddings'])} {self.table.unit} of this process, "
                f"which has {len(self.rows)}: resume with the same labels on the same number of processes."
            )
        self.embeddings, self.next = state["embeddings"].to(self.table.device), int(state["next"])
