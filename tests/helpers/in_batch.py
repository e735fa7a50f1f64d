"""Fixed rows, a recording trainer and gradients in float64, for the tests of in-batch losses."""

import copy

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments

from helpers.tiny import LABELS, POSITIVES
from helpers.training import ONE_STEP, TINY
from hf_xmc import in_batch_dataset, st_losses
from hf_xmc.losses import functional

TEMPERATURE, BIAS = 0.5, -3.0
LOSSES = {
    "decoupled": (st_losses.DecoupledSoftmaxLoss, lambda s, p, _: functional.decoupled_softmax_loss(s, p), {}),
    "softmax": (st_losses.SoftmaxLoss, lambda s, p, _: functional.softmax_loss(s, p), {}),
    "soft top-k": (st_losses.SoftTopKLoss, lambda s, p, _: functional.soft_top_k_loss(s, p, 3), {"k": 3}),
    "bce": (
        st_losses.BCELoss,
        lambda s, p, learned: functional.bce_loss(
            s, p, bias=learned["loss.bias"], scale=learned["loss.log_scale"].exp()
        ),
        {"bias": BIAS},
    ),
}


def rows(queries, **settings):
    """The data set, its positives drawn once and for all."""
    torch.manual_seed(7)
    drawn = in_batch_dataset(queries, LABELS, **settings)
    return Dataset.from_list([drawn[i] for i in range(len(drawn))])


def hard_negatives(columns=2):
    return np.random.default_rng(0).integers(-1, len(LABELS), (len(POSITIVES), columns)).clip(-100)


def arguments(folder, **settings):
    """Return stock arguments of one step of plain gradient descent."""
    defaults = {**TINY, **ONE_STEP, "per_device_train_batch_size": 6}
    return SentenceTransformerTrainingArguments(str(folder), **{**defaults, **settings})


def one_step_after(encoder, name, accumulated, similarity, gathered=False):
    """Parameters after one step in float64, named as in the loss, and the largest norm of a gradient.

    Args:
        encoder: before the step.
        name: one of ``LOSSES``.
        accumulated: ``accumulated[a][r]`` is the batch of process ``r`` in the ``a``-th part of the step.
        gathered: every process scores against the candidates of all.
    """
    exact, formula = copy.deepcopy(encoder).double().eval(), LOSSES[name][1]
    learned = {"loss.bias": BIAS, "loss.log_scale": 0.0} if name == "bce" else {}
    learned = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in learned.items()}
    total = torch.zeros((), dtype=torch.float64)
    for processes in accumulated:
        embedded = [
            ([exact(dict(column))["sentence_embedding"] for column in features], label) for features, label in processes
        ]
        for (queries, *columns), label in embedded:
            others = embedded if gathered else [((queries, *columns), label)]
            candidates = torch.cat([torch.cat(theirs[1:]) for theirs, _ in others])
            ids = [i for theirs, label in others for i in label[:, : len(theirs) - 1].T.reshape(-1).tolist()]
            present = sorted({i for i in ids if i >= 0})
            chosen = candidates[[ids.index(i) for i in present]]  # a label once, wherever it came from
            known = [[present.index(i) for i in row if i in present] for row in label[:, len(columns) :].tolist()]
            width = max(map(len, known))
            positives = torch.tensor([row + [-100] * (width - len(row)) for row in known])
            loss = formula(similarity(queries, chosen) / TEMPERATURE, positives, learned)
            total = total + loss / len(processes) / len(accumulated)
    total.backward()
    parameters = {**{f"model.{n}": p for n, p in exact.named_parameters()}, **learned}
    largest = max(float(p.grad.norm()) for p in parameters.values() if p.grad is not None)
    moved = {n: p.detach() if p.grad is None else p.detach() - p.grad for n, p in parameters.items()}
    return moved, largest


def assert_same_weights(got, expected):
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            got[name].double(), weight.double(), rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
