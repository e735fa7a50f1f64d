"""A vector of its own for each label, which is added to the embedding of the label's text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_xmc import distributed
from hf_xmc.data.labels import LabelTexts
from hf_xmc.distributed import LabelShard
from hf_xmc.encoders import roles
from hf_xmc.evaluator import XMCEvaluator
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.negatives import ScoredLabels
from hf_xmc.training.row_adam import RowAdam
from hf_xmc.training.sparse_gradients import gather_rows

STATE = "label-vectors-{rank}.safetensors"


class LabelVectors:
    r"""The vectors of the labels of this process, and their optimizer.

    The embedding of label :math:`l` with the text :math:`t` is

    .. math:: y_l = f(t) + v_l, \qquad \text{or} \quad y_l = \frac{f(t) + v_l}{\lVert f(t) + v_l \rVert}

    if the encoder :math:`f` normalises its embeddings. All texts of a label share its vector. A vector starts at zero
    and follows :class:`RowAdam` at a fraction of the learning rate, without weight decay. The norm of the gradient that
    is clipped covers encoder and vectors. Only vectors of labels that a step scores are read and written. Each process
    holds the vectors of its own labels, so nothing is summed over processes. (A free vector next to the text encoder,
    as the label classifiers of Dahiya et al., NGAME, WSDM 2023, and SiameseXML, ICML 2021, but trained together.)

    Args:
        table: The tokenized labels.
        rate: Learning rate of the vectors, as a multiple of the encoder's.

    Attributes:
        weight: ``(L / W, D)``, the vectors, in the order of the label ids.
        shard: The label ids of this process.
    """

    def __init__(self, table: TokenizedLabels, rate: float) -> None:
        encoder = table.encoder
        self.rate, self.normalised = rate, roles.normalises(encoder)
        self.shard = LabelShard.of(table.num_labels, distributed.rank(), distributed.world_size())
        size = self.shard.stop - self.shard.start, encoder.get_embedding_dimension() or 0
        dtype = torch.promote_types(encoder.dtype or torch.float32, torch.float32)
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=table.device))
        self.optimizer = RowAdam([self.weight])

    def add(self, texts: Tensor, labels: ScoredLabels) -> Tensor:
        """Return the embeddings of labels ``(t, D)``, given those of their texts, label after label.

        Raises:
            ValueError: if a label belongs to another process.
        """
        rows = self.shard.localize(torch.from_numpy(labels.label_ids).to(self.weight.device))
        if bool((rows < 0).any()):
            raise ValueError(
                f"with label_vectors, each process must embed labels of its own, which on rank {distributed.rank()} "
                f"are {self.shard.start} to {self.shard.stop - 1}; `negatives` selected label "
                f"{int(labels.label_ids[(rows < 0).cpu().numpy()][0])}. Select labels of `LabelShard.of(num_labels, "
                "rank, world_size)`, or set label_vectors to 0."
            )
        vectors = gather_rows(self.weight, rows)
        if labels.text_counts is not None:
            vectors = vectors.repeat_interleave(labels.text_counts, dim=0)
        embeddings = texts + vectors.to(texts.dtype)
        return normalize(embeddings) if self.normalised else embeddings

    def finish_gradient(self, factor: float) -> None:
        """Multiply the gradient by a factor, once it is complete."""
        if self.weight.grad is not None:
            self.weight.grad = self.weight.grad.coalesce()
            self.weight.grad.values().mul_(factor)

    def step(self, learning_rate: float) -> None:
        """Update the vectors that have a gradient, and forget it.

        Args:
            learning_rate: The present learning rate of the encoder.
        """
        self.optimizer.param_groups[0]["lr"] = self.rate * learning_rate
        self.optimizer.step()
        self.weight.grad = None

    @torch.no_grad()
    def everyone(self) -> Tensor:
        """Return the vectors of all labels ``(L, D)``, on the CPU. Every process must call it."""
        return distributed.gather_rows(self.weight.detach()).to("cpu", torch.float32, copy=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the vectors of this process, and the state of their optimizer."""
        return {"vectors": self.weight.detach(), **self.optimizer.state[self.weight]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if the vectors are those of other labels or another encoder.
        """
        if state["vectors"].shape != self.weight.shape:
            raise ValueError(
                f"the checkpoint holds label vectors of shape {tuple(state['vectors'].shape)} for this process, which "
                f"needs {tuple(self.weight.shape)}. Resume with the same labels on the same number of processes."
            )
        self.weight.copy_(state["vectors"])
        self.weight.grad = None
        places = {name: "cpu" if name == "step" else self.weight.device for name in state if name != "vectors"}
        self.optimizer.state[self.weight] = {name: state[name].to(place).clone() for name, place in places.items()}


def save_vectors(vectors: LabelVectors | None, folder: Path) -> None:
    """Write the vectors of this process into a checkpoint, if there are any."""
    if vectors is not None:
        save_file(vectors.state_dict(), folder / STATE.format(rank=distributed.rank()))


def load_vectors(vectors: LabelVectors | None, folder: Path) -> None:
    """Restore the vectors of this process from a checkpoint.

    Raises:
        ValueError: if only the checkpoint or only the training has vectors.
    """
    path = folder / STATE.format(rank=distributed.rank())
    if path.exists() != (vectors is not None):
        raise ValueError(
            f"{folder} has {'' if path.exists() else 'no '}label vectors of this process in {path.name}, and "
            f"label_vectors is {0 if vectors is None else vectors.rate}. Resume with the settings of the first run, on "
            "as many processes."
        )
    if vectors is not None:
        vectors.load_state_dict(load_file(path))


@contextmanager
def evaluated_with(evaluator: Any, labels: LabelTexts, vectors: Tensor | None) -> Iterator[None]:
    """Let the :class:`XMCEvaluator` in ``evaluator``, if any, add the vectors of labels until the context ends.

    A label of the evaluator gets a vector if a label of the training has the same uid and the same preferred text.

    Args:
        evaluator: An evaluator, or a sequence of evaluators, of sentence-transformers; ``None`` for none.
        labels: The ``L`` labels of the training.
        vectors: ``(L, D)``; ``None`` to change nothing.
    """
    found = [] if vectors is None else list(_own_evaluators(evaluator))
    before = [one.label_vectors for one in found]
    try:
        for one in found:
            assert vectors is not None
            one.label_vectors = vectors_for(one.table, labels, vectors)
        yield
    finally:
        for one, vectors_before in zip(found, before, strict=True):
            one.label_vectors = vectors_before


def vectors_for(wanted: LabelTexts, labels: LabelTexts, vectors: Tensor) -> Tensor:
    """Return a vector for each label of ``wanted``: zero for a label that is not among ``labels``."""
    theirs, ours = (list(zip(one.labels["uid"], one.labels["text"], strict=True)) for one in (wanted, labels))
    if theirs == ours:
        return vectors
    row_of = {name: row for row, name in enumerate(ours)}
    rows = torch.tensor([row_of.get(name, -1) for name in theirs])
    return vectors[rows.clamp(min=0)] * (rows >= 0)[:, None]


def _own_evaluators(evaluator: Any) -> Iterator[XMCEvaluator]:
    if isinstance(evaluator, XMCEvaluator):
        yield evaluator
    for one in getattr(evaluator, "evaluators", []):  # of a SequentialEvaluator
        yield from _own_evaluators(one)
