"""The losses in float64 against 60 digits, with positives far from the threshold of softplus."""

import mpmath
import pytest
import torch

from hf_xmc.losses import functional, streaming
from hf_xmc.losses.soft_top_k import softplus

SCORES = [3.25, -41.0, -17.75, -9.5, 7.5, -20.75, 1.0, -13.3, 12.0]
POSITIVES = [1, 3, 5, 7]  # 21 to 53 below the best negative


def by_definition(name, scores):
    """The docstrings' formulas for one query, in mpmath."""
    positives, negatives = ([s for i, s in enumerate(scores) if (i in POSITIVES) == wanted] for wanted in (True, False))

    def cost(x):
        return mpmath.log1p(mpmath.exp(x))

    if name == "decoupled_softmax_loss":
        total = mpmath.log(sum(map(mpmath.exp, negatives)))
        return sum(cost(total - s) for s in positives) / len(positives)
    if name == "bce_loss":
        return (sum(cost(-s) for s in positives) + sum(map(cost, negatives))) / len(scores)
    threshold = mpmath.findroot(lambda t: sum(1 / (1 + mpmath.exp(-s - t)) for s in scores) - 2, -7.5)
    return sum(cost(-s - threshold) for s in positives) / len(positives)


STEP = mpmath.mpf("1e-25")


def gradient(name):
    def moved(place, by):
        return [mpmath.mpf(s) + (by if i == place else 0) for i, s in enumerate(SCORES)]

    return [
        float((by_definition(name, moved(i, STEP)) - by_definition(name, moved(i, -STEP))) / (2 * STEP))
        for i in range(len(SCORES))
    ]


@pytest.mark.parametrize("name", ["decoupled_softmax_loss", "bce_loss", "soft_top_k_loss"])
def test_losses_in_float64_equal_60_digit_values(name):
    settings = {"k": 2.0} if name == "soft_top_k_loss" else {}
    with mpmath.workdps(60):
        value, slope = float(by_definition(name, list(map(mpmath.mpf, SCORES)))), gradient(name)
    # With the unit vectors as labels the scores are the query itself, and their gradient is the query's.
    labels, positives = torch.eye(len(SCORES), dtype=torch.float64), torch.tensor([POSITIVES])
    for streamed in (False, True):
        query = torch.tensor([SCORES], dtype=torch.float64, requires_grad=True)
        if streamed:
            loss = getattr(streaming, name)(query, labels, positives, **settings)
        else:
            loss = getattr(functional, name)(query, positives, **settings)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-14, abs=0), streamed
        assert query.grad[0].tolist() == pytest.approx(slope, rel=2e-14, abs=0), streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_exact_from_underflow_to_infinity(dtype):
    x = torch.tensor([-700.0, -80.0, -1e-6, 0.0, 1e-6, 19.9, 20.5, 36.0, 39.9, 40.1, 700.0, 1e30], dtype=dtype)
    x.requires_grad_()
    y = softplus(x)
    y.sum().backward()
    with mpmath.workdps(60):
        exact = [mpmath.log1p(mpmath.exp(mpmath.mpf(v))) if v < 1000 else v for v in x.tolist()]
        slopes = [1 / (1 + mpmath.exp(-mpmath.mpf(v))) if v < 1000 else 1 for v in x.tolist()]
    ulps = 3 * torch.finfo(dtype).eps
    assert y.tolist() == pytest.approx(list(map(float, exact)), rel=ulps, abs=torch.finfo(dtype).tiny)
    assert x.grad.tolist() == pytest.approx(list(map(float, slopes)), rel=ulps, abs=torch.finfo(dtype).tiny)
    ends = torch.tensor([float("inf"), -float("inf")], dtype=dtype)
    assert softplus(ends).tolist() == [float("inf"), 0]
