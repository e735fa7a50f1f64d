"""The loss modules add settings to the functions, and nothing else."""

import pytest
import torch

from hf_xmc import losses
from hf_xmc.losses import streaming

CASES = [
    (losses.DecoupledSoftmaxLoss, {}, streaming.decoupled_softmax_loss, {}),
    (losses.SoftmaxLoss, {}, streaming.softmax_loss, {}),
    (losses.SoftTopKLoss, {"k": 3, "alpha": 2.0}, streaming.soft_top_k_loss, {"k": 3, "alpha": 2.0}),
    (losses.BCELoss, {"bias": -2.0}, streaming.bce_loss, {"bias": -2.0, "scale": 1.0}),
    (losses.BCELoss, {"bias": None}, streaming.bce_loss, {}),
]


@pytest.mark.parametrize(("module", "settings", "function", "arguments"), CASES)
def test_a_module_is_its_function_at_its_temperature(module, settings, function, arguments):
    torch.manual_seed(0)
    queries, labels = torch.randn(5, 4), torch.randn(13, 4)
    positives = torch.tensor([[0, 12], [3, -100], [-100, -100], [7, 7], [1, 2]])
    got = module(**settings, temperature=0.5)(queries, labels, positives)
    torch.testing.assert_close(got, function(2 * queries, labels, positives, **arguments))
    assert module(**settings, temperature=0.5).get_config_dict()["temperature"] == 0.5


def test_the_precision_of_the_gradient_products_reaches_the_function():
    torch.manual_seed(0)
    queries, labels, positives = torch.randn(5, 4), torch.randn(13, 4), torch.randint(13, (5, 2))
    for module, settings, *_ in CASES:
        made = []
        for dtype in (None, torch.bfloat16):
            x = queries.clone().requires_grad_()
            module(**settings, gradient_dtype=dtype)(x, labels, positives).backward()
            made.append(x.grad)
        assert 0 < (made[0] - made[1]).norm() < 0.02 * made[0].norm()


def test_bias_and_scale_are_learned_and_stay_out_without_a_bias():
    loss = losses.BCELoss(bias=-2.0)
    loss(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([[0], [1], [2]])).backward()
    assert {name: bool(p.grad.abs() > 0) for name, p in loss.named_parameters()} == {"bias": True, "log_scale": True}
    assert list(losses.BCELoss(bias=None).parameters()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.SoftmaxLoss(temperature=0), "temperature must be positive, got 0"),
        (lambda: losses.SoftmaxLoss(memory_budget=0), "memory_budget is a number of bytes above 0, got 0"),
        (lambda: losses.SoftTopKLoss(k=0), "k and alpha must be positive, got k=0"),
        (lambda: losses.SoftTopKLoss(alpha=-1), "got k=5 and alpha=-1"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
