"""A sample of the labels as negatives, drawn with the help of the gradients of earlier steps."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from hf_xmc import distributed
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.gradient_cache import gradient_norms
from hf_xmc.training.negatives import BatchQueries, LabelColumns, ScoredLabels, StepWork, embed_labels, own_labels
from hf_xmc.training.sampling import inclusion_probabilities, systematic_sample

FLOOR = 0.05  # importance added to every label, as a multiple of the mean: the averages may be out of date
DECAY = 0.9  # of the running average, in steps in which the label takes part


class SampledLabels:
    r"""The positives of the batch and a sample of the other labels, each of which stands for :math:`1 / \pi_l` labels.

    The norm of the gradient at a label's embedding, without its weight :math:`1 / \pi_l`, is averaged over the steps in
    which the label takes part. The probability :math:`\pi_l` of drawing it is in proportion to that average. So no step
    has to look at all labels: its cost depends on the sample, not on the number of labels. The loss sums over the
    selected labels, :math:`\sum_l e^{s_l} / \pi_l`, which is an unbiased estimate of the sum over all labels. Its
    logarithm, and so the gradient, is not exactly unbiased; see :class:`hf_xmc.training.label_bank.LabelBank` for a
    more precise estimate at a higher cost. The positives of the batch have probability 1. Each process samples its own
    labels.

    Args:
        table: The tokenized labels.
        fraction: Fraction of the labels that are drawn in addition to the batch's positives, in (0, 1].
        normalised: Whether the encoder normalises its embeddings.
    """

    def __init__(self, table: TokenizedLabels, fraction: float, normalised: bool) -> None:
        self.table, self.sample_fraction, self.normalised = table, fraction, normalised
        self.label_ids = own_labels(table)
        self.columns = LabelColumns(self.label_ids, table.device)
        self.importance = torch.full((len(self.label_ids),), math.nan, device=table.device)  # NaN until it takes part
        self.saving_rank = distributed.rank()  # each process samples its own labels

    def select(self, encoder: nn.Module, batch: BatchQueries) -> ScoredLabels:
        """Return the positives of the batch and a sample of the other labels, with their weights."""
        mine = self.columns.shard.localize(self.columns(batch.positives))
        mine = mine[mine >= 0]
        mean = self.importance.nanmean().nan_to_num(1.0)
        importance = torch.where(self.importance.isnan(), mean, self.importance) + FLOOR * mean
        importance[mine] = 0  # selected in any case, in addition to the sample
        probabilities = inclusion_probabilities(importance, math.ceil(self.sample_fraction * len(importance)))
        probabilities[mine] = 1
        drawn = systematic_sample(probabilities)
        label_ids = self.label_ids[drawn.cpu().numpy()]
        columns = LabelColumns(label_ids, self.table.device)
        return ScoredLabels(
            label_ids,
            columns(batch.positives),
            columns.shard,
            1 / probabilities[drawn],
            text_counts=self.table.counts_of(label_ids),
        )

    def embed(self, encoder: nn.Module, selected: ScoredLabels) -> Tensor:
        """Embed the texts of the selected labels, and remember the norm of their gradient: ``(t, D)``."""
        embeddings = embed_labels(encoder, self.table, selected.label_ids)
        if embeddings.requires_grad:
            embeddings.register_hook(partial(self._observe, selected, embeddings.detach()))
        return embeddings

    def _observe(self, selected: ScoredLabels, embeddings: Tensor, grad: Tensor) -> None:
        norms = gradient_norms(grad, embeddings if self.normalised else None)
        if selected.text_counts is not None:
            norms = torch.segment_reduce(norms, "sum", lengths=selected.text_counts)
        assert selected.label_weights is not None
        norms = norms / selected.label_weights.to(norms.dtype)
        ids = torch.from_numpy(selected.label_ids).to(norms.device)
        labels = self.columns(ids) - self.columns.shard.start
        known = self.importance[labels]
        average = torch.where(known.isnan(), norms, DECAY * known + (1 - DECAY) * norms)
        self.importance[labels] = torch.where(norms.isfinite(), average, known)  # an update that is skipped, perhaps

    def work(self, batch_size: int, num_positives: float) -> StepWork:
        """Return the work of a step if the positives of all queries differ."""
        labels = self.table.num_labels
        number = self.sample_fraction * labels + min(batch_size * num_positives, (1 - self.sample_fraction) * labels)
        return StepWork(number, number * len(self.table) / labels / distributed.world_size(), at_most=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages."""
        return {"importance": self.importance}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the averages.

        Raises:
            ValueError: if they are averages of another number of labels.
        """
        if len(state["importance"]) != len(self.importance):
            raise ValueError(
                f"the checkpoint holds gradient norms of {len(state['importance'])} labels of this process, which has "
                f"{len(self.importance)}. Resume with the same labels on the same number of processes."
            )
        self.importance = state["importance"].to(self.table.device)
