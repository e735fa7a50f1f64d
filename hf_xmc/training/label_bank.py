"""A sample of the labels as negatives, drawn with the help of remembered label embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.encoders.forward import embed
from hf_xmc.training.batching import TokenizedLabels, ranges
from hf_xmc.training.gradient_cache import gradient_norms
from hf_xmc.training.label_vectors import LabelVectors
from hf_xmc.training.negatives import BatchQueries, LabelColumns, ScoredLabels, StepWork, embed_labels, own_labels
from hf_xmc.training.sampling import inclusion_probabilities, systematic_sample

FLOOR = 1.0  # importance added to every label, as a multiple of the mean: remembered embeddings may be out of date


class LabelBank:
    r"""The positives of the batch and a sample of the other labels, each of which stands for :math:`1 / \pi_l` labels.

    The bank remembers the last embedding of every label. The gradient of the batch's loss at the remembered embeddings
    gives the probability :math:`\pi_l` of drawing a label, and is used for nothing else. The selected labels are
    embedded again, and the loss sums over them alone: :math:`\sum_l e^{s_l} / \pi_l`. New and remembered scores are
    never added up, because all embeddings drift together. The positives of the batch have probability 1. Each process
    samples its own labels.

    The gradient at the queries gets a control variate from the remembered embeddings :math:`M`. Its mean is zero, and
    it reduces the variance more if the embeddings are recent:

    .. math:: \nabla_q \ell_S(q, Y_S) + \nabla_q \ell(q, M) - \nabla_q \ell_S(q, M_S)

    Embeddings of selected labels are remembered, and the others are refreshed in turn, so that none is older than
    ``max_age``. All texts of a selected label take part.

    Args:
        table: The tokenized labels.
        loss: The loss that is trained, which must support label weights.
        fraction: Fraction of the labels that are drawn in addition to the batch's positives, in (0, 1].
        max_age: Maximum age of an embedding, in batches.
        normalised: Whether the encoder normalises its embeddings.
        vectors: The vectors of the labels, if any, which are added to remembered embeddings too.
    """

    def __init__(
        self,
        table: TokenizedLabels,
        loss: nn.Module,
        fraction: float,
        max_age: int,
        normalised: bool,
        vectors: LabelVectors | None = None,
    ) -> None:
        self.table, self.loss, self.sample_fraction, self.normalised = table, loss, fraction, normalised
        self.vectors = vectors
        self.label_ids = own_labels(table)
        self.columns = LabelColumns(self.label_ids, table.device)
        self.rows, self.text_counts = table.rows_of(self.label_ids), table.counts_of(self.label_ids)
        self.num_refreshed = math.ceil(len(self.rows) / max_age)
        self.embeddings: Tensor | None = None  # (T / W, D), made in the first step
        self.next = 0  # the row to refresh next
        self.saving_rank = distributed.rank()  # each process remembers its own labels

    @torch.no_grad()
    def select(self, encoder: nn.Module, batch: BatchQueries) -> ScoredLabels:
        """Return the positives of the batch and a sample, with label weights and the control variate of the queries."""
        self._refresh(encoder)
        assert self.embeddings is not None
        columns = self.columns(batch.positives)
        all_labels = ScoredLabels(self.label_ids, columns, self.columns.shard, text_counts=self.text_counts)
        at_texts, at_queries = self._gradients(batch, self.embeddings, all_labels)
        importance = gradient_norms(at_texts, self.embeddings if self.normalised else None)
        if self.text_counts is not None:
            importance = torch.segment_reduce(importance, "sum", lengths=self.text_counts)
        mine = self.columns.shard.localize(columns)
        mine = mine[mine >= 0]
        importance[mine] = 0
        importance += FLOOR * importance.mean()
        importance[mine] = 0  # selected in any case, in addition to the sample
        probabilities = inclusion_probabilities(importance, math.ceil(self.sample_fraction * len(importance)))
        probabilities[mine] = 1
        drawn = systematic_sample(probabilities)
        label_ids = self.label_ids[drawn.cpu().numpy()]
        chosen = LabelColumns(label_ids, self.table.device)
        sample = ScoredLabels(
            label_ids,
            chosen(batch.positives),
            chosen.shard,
            1 / probabilities[drawn],
            text_counts=self.table.counts_of(label_ids),
        )
        _, of_sample = self._gradients(batch, self.embeddings[self._rows_of(drawn)], sample)
        return sample._replace(query_control_variate=at_queries - of_sample)

    def embed(self, encoder: nn.Module, selected: ScoredLabels) -> Tensor:
        """Embed the texts of the selected labels, label after label, and remember them: ``(t, D)`` with a gradient."""
        embeddings = embed_labels(encoder, self.table, selected.label_ids)
        assert self.embeddings is not None  # `select` came first
        labels = self.columns(torch.from_numpy(selected.label_ids).to(embeddings.device)) - self.columns.shard.start
        self.embeddings[self._rows_of(labels)] = embeddings.detach().to(self.embeddings.dtype)
        return embeddings

    def _rows_of(self, labels: Tensor) -> Tensor:
        """Return the rows of the remembered embeddings of labels, given as positions in ``label_ids``."""
        if self.text_counts is None:
            return labels
        counts = self.text_counts.cpu().numpy()
        rows = ranges(counts.cumsum() - counts, counts, labels.cpu().numpy())
        return torch.from_numpy(rows).to(labels.device)

    def _gradients(self, batch: BatchQueries, texts: Tensor, labels: ScoredLabels) -> tuple[Tensor, Tensor]:
        """Return the gradients of the loss at the remembered texts and at the queries (this process's part)."""
        with torch.enable_grad():
            queries, texts = batch.embeddings.detach().requires_grad_(), texts.detach().requires_grad_()
            embeddings = texts if self.vectors is None else self.vectors.add(texts, labels)
            loss = labels.loss(self.loss, queries, embeddings, batch.weights)
        at_texts, at_queries = torch.autograd.grad(loss, [texts, queries])
        return at_texts, at_queries

    def _refresh(self, encoder: nn.Module) -> None:
        rows = torch.arange(self.next, self.next + self.num_refreshed) % len(self.rows)
        if self.embeddings is None:
            rows = torch.arange(len(self.rows))
        for part, features in self.table.chunks(self.rows[rows.numpy()]):
            embeddings = embed(encoder, features)
            if self.embeddings is None:
                self.embeddings = embeddings.new_empty(len(self.rows), embeddings.shape[1], dtype=torch.bfloat16)
            self.embeddings[rows[part].to(embeddings.device)] = embeddings.to(torch.bfloat16)
        self.next = (self.next + self.num_refreshed) % len(self.rows)

    def work(self, batch_size: int, num_positives: float) -> StepWork:
        """Return the work of a step if the positives of all queries differ."""
        labels = self.table.num_labels
        number = self.sample_fraction * labels + min(batch_size * num_positives, (1 - self.sample_fraction) * labels)
        texts_per_label = len(self.table) / labels
        embedded = number * texts_per_label / distributed.world_size()
        return StepWork(number, embedded, refreshed=self.num_refreshed, at_most=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the remembered embeddings, if there are any, and the row to refresh next."""
        made = {} if self.embeddings is None else {"embeddings": self.embeddings}
        return {**made, "next": torch.tensor(self.next)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the remembered embeddings.

        Raises:
            ValueError: if they are embeddings of another number of texts.
        """
        embeddings = state.get("embeddings")
        if embeddings is not None and len(embeddings) != len(self.rows):
            raise ValueError(
                f"the checkpoint's label bank holds {len(embeddings)} {self.table.unit} of this process, "
                f"which has {len(self.rows)}. Resume with the same labels on the same number of processes."
            )
        self.embeddings = None if embeddings is None else embeddings.to(self.table.device)
        self.next = int(state["next"])
