"""The losses: hand-computed values, gradients against float64 autograd, and degenerate rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_xmc.losses.functional import (
    IGNORE_INDEX,
    bce_loss,
    decoupled_softmax_loss,
    soft_top_k,
    soft_top_k_loss,
    soft_top_k_threshold,
    softmax_loss,
)

PAD = IGNORE_INDEX
LOSSES = {
    "decoupled": decoupled_softmax_loss,
    "softmax": softmax_loss,
    "bce": bce_loss,
    "soft_top_k": lambda scores, positives, weights=None: soft_top_k_loss(scores, positives, k=3, weights=weights),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def soft_top_k_slowly(scores: list[float], k: float, alpha: float) -> list[float]:
    """Bisection in Python floats."""
    low, high = -max(scores) - 50 / alpha, -min(scores) + 50 / alpha
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(1 / (1 + math.exp(-alpha * (s + middle))) for s in scores)
        low, high = (middle, high) if total < k else (low, middle)
    return [1 / (1 + math.exp(-alpha * (s + low))) for s in scores]


def by_definition(name: str, scores: Tensor, positives: list[list[int]], weights: list[list[float]]) -> float:
    """The formulas of the docstrings, written again with loops over Python floats."""
    rows = []
    for row, labels, row_weights in zip(scores.tolist(), positives, weights, strict=True):
        weight = dict(zip(labels, row_weights, strict=True))
        weight = {label: w for label, w in weight.items() if label != PAD}
        if not sum(weight.values()):
            continue
        negatives = [j for j in range(len(row)) if j not in weight]
        taking_part = negatives + [p for p, w in weight.items() if w > 0]

        def one(p, row=row, negatives=negatives, taking_part=taking_part):
            if name == "decoupled":
                return -math.log(math.exp(row[p]) / (math.exp(row[p]) + sum(math.exp(row[n]) for n in negatives)))
            if name == "softmax":
                return -math.log(math.exp(row[p]) / sum(math.exp(row[j]) for j in taking_part))
            if name == "bce":
                return math.log(1 + math.exp(-row[p]))
            if len(taking_part) <= 3:
                return 0.0
            return -math.log(soft_top_k_slowly([row[j] for j in taking_part], 3, 1.0)[taking_part.index(p)])

        total, mass = sum(w * one(p) for p, w in weight.items() if w > 0), sum(weight.values())
        if name == "bce":
            total += sum(math.log(1 + math.exp(row[n])) for n in negatives)
            mass += len(negatives)
        rows.append(total / mass)
    return sum(rows) / len(rows) if rows else 0.0


POSITIVES = [[2, 5, PAD], [PAD, PAD, PAD], [0, PAD, 6], [3, 1, 4]]
WEIGHTS = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 9.0, 2.0], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("graded", [False, True])
def test_loss_and_gradient_equal_the_formula(name, graded):
    scores = 3 * torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = [[0.0 if p == PAD else 1.0 for p in row] for row in POSITIVES]
    expected = by_definition(name, scores, POSITIVES, WEIGHTS if graded else ones)
    got = LOSSES[name](scores, torch.tensor(POSITIVES), weights=torch.tensor(WEIGHTS) if graded else None)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_loss_equals_hand_computed_values():
    scores, positives = torch.tensor([[math.log(6.0), math.log(2.0), 0.0, 0.0]]), torch.tensor([[0, 1]])
    # e^s = 6, 2, 1, 1. Decoupled: 6/(6+2) and 2/(2+2). Softmax: 6/10 and 2/10.
    assert decoupled_softmax_loss(scores, positives).item() == pytest.approx(-(math.log(6 / 8) + math.log(2 / 4)) / 2)
    assert softmax_loss(scores, positives).item() == pytest.approx(-(math.log(6 / 10) + math.log(2 / 10)) / 2)
    # sigmoid: 6/7, 2/3, 1/2, 1/2
    bce = -(math.log(6 / 7) + math.log(2 / 3) + 2 * math.log(1 / 2)) / 4
    assert bce_loss(scores, positives).item() == pytest.approx(bce)
    # one score apart: sigmoid(a) + 3 sigmoid(b) = 2, by symmetry of 2 and 2 labels
    symmetric = torch.tensor([[5.0, 5.0, -5.0, -5.0]])
    expected = -math.log(1 / (1 + math.exp(-5)))
    assert soft_top_k_loss(symmetric, positives, k=2).item() == pytest.approx(expected, rel=1e-5)


def test_positive_never_competes_with_a_positive():
    scores = torch.zeros(1, 4, requires_grad=True)
    decoupled_softmax_loss(scores, torch.tensor([[0, 1]])).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-1 / 3, -1 / 3, 1 / 3, 1 / 3]]))


def test_unsampled_positive_is_neither_positive_nor_negative():
    for loss in LOSSES.values():
        scores = torch.zeros(1, 6, requires_grad=True)
        loss(scores, torch.tensor([[0, 1]]), weights=torch.tensor([[0.0, 1.0]])).backward()
        assert scores.grad[0, 0] == 0
        assert scores.grad[0, 1] < 0
        assert (scores.grad[0, 2:] > 0).all()


def test_bce_without_weights_equals_torch_bce():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    truth = torch.zeros(3, 7)
    truth[0, 2] = truth[1, [0, 6]] = truth[2, 3] = 1
    positives = torch.tensor([[2, PAD], [0, 6], [3, 3]])
    torch.testing.assert_close(bce_loss(scores, positives), F.binary_cross_entropy_with_logits(scores, truth))


def test_bias_and_scale_of_bce_receive_gradients():
    scores, positives = torch.randn(3, 7, dtype=torch.float64), torch.tensor([[2], [1], [0]])
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, a: bce_loss(scores, positives, bias=b, scale=a), (bias, scale))
    torch.testing.assert_close(bce_loss(scores, positives, bias=bias, scale=scale), bce_loss(3 * scores - 2, positives))


@every_loss
def test_losses_pass_gradcheck(loss):
    scores = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss(s, torch.tensor(POSITIVES)), scores)
    assert torch.autograd.gradcheck(lambda s: loss(s, torch.tensor(POSITIVES), weights=torch.tensor(WEIGHTS)), scores)


@pytest.mark.parametrize("k", [1, 2.5, 6])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_soft_top_k_sums_to_k_and_has_the_gradient_of_the_constraint(k, alpha):
    scores = 2 * torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = soft_top_k(scores, k, alpha)
    torch.testing.assert_close(p.sum(1), torch.full((3,), float(k), dtype=torch.float64))
    torch.testing.assert_close(p[0], torch.tensor(soft_top_k_slowly(scores[0].tolist(), k, alpha), dtype=p.dtype))
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, k, alpha), scores.requires_grad_())


def test_soft_top_k_accepts_another_k_for_each_row():
    scores = torch.randn(3, 7)
    k = torch.tensor([1.0, 3.0, 7.0])
    torch.testing.assert_close(soft_top_k(scores, k).sum(1), k)


def test_soft_top_k_selects_everything_if_k_covers_all_labels():
    scores = torch.randn(2, 3, requires_grad=True)
    for k in (3, 4, 1000):
        assert (soft_top_k(scores, k) == 1).all()
        loss = soft_top_k_loss(scores, torch.tensor([[0], [2]]), k=k)
        loss.backward()
        assert loss == 0
        assert (scores.grad == 0).all()


@every_loss
@pytest.mark.parametrize(
    "positives", [[[PAD, PAD]], [[0, 1, 2]], [[PAD] * 0]], ids=["no positive", "all labels positive", "no column"]
)
def test_degenerate_rows_are_finite_and_leave_other_rows_unchanged(loss, positives):
    scores = torch.randn(1, 3, requires_grad=True)
    value = loss(scores, torch.tensor(positives, dtype=torch.long).reshape(1, -1))
    value.backward()
    assert value.isfinite()
    assert scores.grad.isfinite().all()
    if len(positives[0]) == 2:
        assert value == 0
        assert (scores.grad == 0).all()


@every_loss
def test_row_without_positives_does_not_count_in_the_mean(loss):
    scores = torch.randn(2, 5)
    both = loss(scores, torch.tensor([[1, 2], [PAD, PAD]]))
    torch.testing.assert_close(both, loss(scores[:1], torch.tensor([[1, 2]])))


@every_loss
def test_repeated_label_counts_once(loss):
    scores = torch.randn(1, 6)
    torch.testing.assert_close(loss(scores, torch.tensor([[4, 1, 4]])), loss(scores, torch.tensor([[4, 1]])))


@every_loss
def test_losses_are_finite_for_a_single_label(loss):
    scores = torch.randn(2, 1, requires_grad=True)
    loss(scores, torch.tensor([[0], [PAD]])).backward()
    assert scores.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_are_exact(loss, sign):
    scores = sign * 1e4 * torch.randn(3, 9, generator=torch.Generator().manual_seed(4)).requires_grad_()
    scores.retain_grad()
    positives = torch.tensor([[0, 5], [2, PAD], [8, 1]])
    exact = scores.detach().double().requires_grad_()
    value, truth = loss(scores, positives), loss(exact, positives)
    value.backward()
    truth.backward()
    assert truth > 0, "the case is empty"
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
    # A float32 near 1e4 is rounded to 1e-3, and so is the exponent of every gradient.
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=2e-3, atol=1e-7)


def test_threshold_balances_both_tails_when_no_score_is_near_it():
    # 2 labels at 1e4, 3 at -1e4, k = 2: 2 e^{-(1e4 + t)} = 3 e^{-1e4 + t}, so t = log(2/3)/2.
    scores = torch.tensor([[1e4, 1e4, -1e4, -1e4, -1e4]], dtype=torch.float64)
    expected = torch.tensor([math.log(2 / 3) / 2], dtype=torch.float64)
    torch.testing.assert_close(soft_top_k_threshold(scores, 2), expected, rtol=0, atol=1e-9)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    half = (5 * torch.randn(3, 50, generator=torch.Generator().manual_seed(5))).to(dtype)
    positives = torch.tensor([[0, 5], [2, PAD], [8, 1]])
    value = loss(half, positives)
    assert value.dtype == torch.float32
    assert value == loss(half.float(), positives)


def test_loss_builds_no_graph_without_gradients():
    with torch.no_grad():
        assert decoupled_softmax_loss(torch.zeros(2, 3), torch.tensor([[0], [1]])).grad_fn is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 5), torch.tensor([[0, 7]])), "label id 7, but there are only 5 labels"),
        ((torch.zeros(1, 5), torch.tensor([[-1, 2]])), "label id -1, but .* -100 is padding"),
        ((torch.zeros(2, 5), torch.tensor([[1]])), r"`scores` and `positives` .* got \(2, 5\) and \(1, 1\)"),
        (
            (torch.zeros(1, 5), torch.tensor([[1, 2]]), torch.ones(1, 3)),
            r"`weights` must have the shape of `positives`, .*got \(1, 3\)",
        ),
        ((torch.zeros(1, 5), torch.tensor([[1]]), torch.tensor([[-2.0]])), "`weights` must be 0 or positive, got -2"),
    ],
)
def test_invalid_input_is_named_in_the_error(arguments, message):
    for loss in (decoupled_softmax_loss, softmax_loss, bce_loss):
        with pytest.raises(ValueError, match=message):
            loss(*arguments)


def test_invalid_settings_of_soft_top_k_are_named_in_the_error():
    with pytest.raises(ValueError, match="`k` must be positive, got 0"):
        soft_top_k(torch.zeros(1, 3), k=0)
    with pytest.raises(ValueError, match="`alpha` must be positive, got -1"):
        soft_top_k(torch.zeros(1, 3), k=1, alpha=-1)
