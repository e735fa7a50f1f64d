"""The paper's definitions, by hand in float64: values and gradients, and where its own code deviates from them.

Definitions: Gupta et al., Dual-Encoders for Extreme Multi-Label Classification, ICLR 2024. Deviations of the paper's
code (commit 7690769): a shard's last label is no positive (``cols < last id``), and labels are masked with -100.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_xmc.distributed import LabelShard
from hf_xmc.losses import functional, streaming

SCORES = [[0.3, -1.2, 2.0, 0.7, -0.4], [1.1, 0.2, -0.5, 0.9, 1.6]]
POSITIVES = [[0, 3, 4], [4, -100, -100]]  # a query with three positives, the last label among them, and one with one


def softmax(scores, positives):
    total = sum(math.exp(s) for s in scores)
    shares = [math.exp(s) / total for s in scores]
    loss = -sum(math.log(shares[p]) for p in positives) / len(positives)
    return loss, [share - (j in positives) / len(positives) for j, share in enumerate(shares)]


def decoupled(scores, positives):
    negatives = [j for j in range(len(scores)) if j not in positives]
    loss, gradient = 0.0, [0.0] * len(scores)
    for p in positives:
        total = math.exp(scores[p]) + sum(math.exp(scores[n]) for n in negatives)
        loss -= math.log(math.exp(scores[p]) / total) / len(positives)
        gradient[p] += (math.exp(scores[p]) / total - 1) / len(positives)
        for n in negatives:
            gradient[n] += math.exp(scores[n]) / total / len(positives)
    return loss, gradient


def bce(scores, positives):
    def sigmoid(s):
        return 1 / (1 + math.exp(-s))

    terms = [math.log(sigmoid(s if j in positives else -s)) for j, s in enumerate(scores)]
    gradient = [(sigmoid(s) - (j in positives)) / len(scores) for j, s in enumerate(scores)]
    return -sum(terms) / len(scores), gradient


def soft_top_2(scores, positives):
    low, high = -50.0, 50.0
    for _ in range(200):  # bisection on the sum of sigmoids, as the paper's code finds its threshold
        middle = (low + high) / 2
        short = sum(1 / (1 + math.exp(-s - middle)) for s in scores) < 2
        low, high = (middle, high) if short else (low, middle)
    shares = [1 / (1 + math.exp(-s - middle)) for s in scores]
    slopes = [p * (1 - p) for p in shares]
    loss = -sum(math.log(shares[p]) for p in positives) / len(positives)
    gradient = [0.0] * len(scores)
    for p in positives:  # implicit differentiation of sum = k
        for j, slope in enumerate(slopes):
            gradient[j] -= (1 - shares[p]) * ((j == p) - slope / sum(slopes)) / len(positives)
    return loss, gradient


LOSSES = {
    "softmax_loss": (softmax, {}),
    "decoupled_softmax_loss": (decoupled, {}),
    "bce_loss": (bce, {}),
    "soft_top_k_loss": (soft_top_2, {"k": 2}),
}


def by_hand(name, scores=SCORES, positives=POSITIVES):
    rows = [LOSSES[name][0](row, [p for p in own if p >= 0]) for row, own in zip(scores, positives, strict=True)]
    loss = sum(loss for loss, _ in rows) / len(rows)
    return loss, torch.tensor([[g / len(rows) for g in gradient] for _, gradient in rows], dtype=torch.float64)


def on_scores(name, scores):
    return getattr(functional, name)(scores, torch.tensor(POSITIVES), **LOSSES[name][1])


def from_embeddings(name, scores):
    # Labels are unit vectors, so that the queries are the scores.
    labels = torch.eye(scores.shape[1], dtype=scores.dtype)
    return getattr(streaming, name)(scores, labels, torch.tensor(POSITIVES), **LOSSES[name][1])


@pytest.mark.parametrize("road", [on_scores, from_embeddings])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_definitions_of_the_paper(name, road):
    loss, gradient = by_hand(name)
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    ours = road(name, scores)
    ours.backward()
    assert_close(ours.item(), loss, rtol=0, atol=1e-12)
    assert_close(scores.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("softmax_loss", 1.583374791176),
        ("decoupled_softmax_loss", 1.452170752903),
        ("bce_loss", 0.834537281843),
        ("soft_top_k_loss", 0.763112141654),
    ],
)
def test_losses_equal_golden_values(name, loss):
    """Figures that stand still, should definition and implementation ever be changed together."""
    assert_close(on_scores(name, torch.tensor(SCORES, dtype=torch.float64)).item(), loss, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_last_label_counts_as_a_positive(name):
    """The paper's code loses it; of the second query it is the only positive there is."""
    with_it, gradient = by_hand(name)
    without_it, _ = by_hand(name, positives=[[0, 3], [4]])
    assert abs(with_it - without_it) > 1e-3, "the comparison could not tell"
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    options = streaming.StreamingOptions(shard=LabelShard(0, 5))
    labels = torch.eye(5, dtype=torch.float64)
    ours = getattr(streaming, name)(scores, labels, torch.tensor(POSITIVES), options=options, **LOSSES[name][1])
    ours.backward()
    assert_close(ours.item(), with_it, rtol=0, atol=1e-12)
    assert_close(scores.grad[:, 4], gradient[:, 4], rtol=0, atol=1e-12)
    assert scores.grad[0, 4] < 0
    assert scores.grad[1, 4] < 0


@pytest.mark.parametrize("road", [on_scores, from_embeddings])
def test_loss_of_a_hit_is_small_at_scores_below_minus_100(road):
    """Masked with -100, the other positives would outweigh every label here, and the loss of a hit would be 50."""
    scores = torch.tensor(SCORES, dtype=torch.float64) - 200
    expected, gradient = by_hand("decoupled_softmax_loss")  # the loss knows differences of scores only
    scores.requires_grad_()
    ours = road("decoupled_softmax_loss", scores)
    ours.backward()
    assert_close(ours.item(), expected, rtol=0, atol=1e-12)
    assert_close(scores.grad, gradient, rtol=0, atol=1e-12)

    masked = scores.detach().clone()
    masked[0, [0, 3, 4]], masked[1, 4] = -100.0, -100.0
    theirs = torch.logaddexp(masked.logsumexp(1)[0], scores[0, 0]) - scores[0, 0]
    assert theirs > 90, "the mask of the paper's code would not have shown here"
