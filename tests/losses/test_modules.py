"""The loss modules are the functions, with settings."""

import copy
import logging

import pytest
import torch

from hf_xmc import losses
from hf_xmc.losses import streaming
from hf_xmc.losses.modules import set_default_temperature

CASES = [
    (losses.DecoupledSoftmaxLoss, {}, streaming.decoupled_softmax_loss, {}),
    (losses.SoftmaxLoss, {}, streaming.softmax_loss, {}),
    (losses.SoftTopKLoss, {"k": 3, "alpha": 2.0}, streaming.soft_top_k_loss, {"k": 3, "alpha": 2.0}),
    (losses.BCELoss, {"bias": -2.0}, streaming.bce_loss, {"bias": -2.0, "scale": 1.0}),
    (losses.BCELoss, {"bias": None}, streaming.bce_loss, {}),
]


@pytest.mark.parametrize(("module", "settings", "function", "arguments"), CASES)
def test_module_equals_its_function_at_its_temperature(module, settings, function, arguments):
    torch.manual_seed(0)
    queries, labels = torch.randn(5, 4), torch.randn(13, 4)
    positives = torch.tensor([[0, 12], [3, -100], [-100, -100], [7, 7], [1, 2]])
    got = module(**settings, temperature=0.5)(queries, labels, positives)
    torch.testing.assert_close(got, function(2 * queries, labels, positives, **arguments))
    assert module(**settings, temperature=0.5).temperature == 0.5


def test_module_passes_gradient_dtype_to_the_function():
    torch.manual_seed(0)
    queries, labels, positives = torch.randn(5, 4), torch.randn(13, 4), torch.randint(13, (5, 2))
    for module, settings, *_ in CASES:
        made = []
        for dtype in (None, torch.bfloat16):
            x = queries.clone().requires_grad_()
            module(**settings, gradient_dtype=dtype)(x, labels, positives).backward()
            made.append(x.grad)
        assert 0 < (made[0] - made[1]).norm() < 0.02 * made[0].norm()


def test_bias_and_scale_are_parameters_only_with_a_bias():
    loss = losses.BCELoss(bias=-2.0)
    loss(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([[0], [1], [2]])).backward()
    assert {name: bool(p.grad.abs() > 0) for name, p in loss.named_parameters()} == {"bias": True, "log_scale": True}
    assert list(losses.BCELoss(bias=None).parameters()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.SoftmaxLoss(temperature=0), "`temperature` must be positive, got 0"),
        (lambda: losses.SoftmaxLoss(memory_budget=0), "`memory_budget` must be a number of bytes above 0, got 0"),
        (lambda: losses.SoftTopKLoss(k=0), "`k` and `alpha` must be positive, got k=0"),
        (lambda: losses.SoftTopKLoss(alpha=-1), "got k=5 and alpha=-1"),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NAMES = ["DecoupledSoftmaxLoss", "SoftmaxLoss", "SoftTopKLoss", "BCELoss"]


@pytest.mark.parametrize("name", NAMES)
def test_loss_names_the_other_import_if_given_a_model(name):
    loss, model = getattr(losses, name), torch.nn.Linear(2, 2)
    for make in (lambda: loss(model), lambda: loss(model=model)):
        with pytest.raises(ValueError, match=rf"takes no model.*hf_xmc\.st_losses\.{name}\(model\)"):
            make()


@pytest.mark.parametrize("name", NAMES)
def test_temperature_is_one_until_a_trainer_sets_the_default(name):
    loss, given = getattr(losses, name)(), getattr(losses, name)(temperature=0.3)
    assert loss.temperature == 1
    for cosines, expected in ((True, 0.05), (False, 1.0)):
        for each in (loss, given):
            set_default_temperature(each, cosines=cosines)
        assert loss.temperature == loss.get_config_dict()["temperature"] == expected
        assert given.temperature == given.get_config_dict()["temperature"] == 0.3
    loss.temperature = 0.2
    assert loss.temperature == 0.2


def test_default_temperature_reaches_a_loss_inside_another(caplog):
    outer = losses.SoftmaxLoss(0.5)
    outer.other = losses.BCELoss()
    with caplog.at_level(logging.INFO, "hf_xmc"):
        set_default_temperature(outer, cosines=True)
    assert (outer.temperature, outer.other.temperature) == (0.5, 0.05)
    assert [r.message for r in caplog.records] == ["BCELoss uses the temperature 0.05, the default for cosines."]


def test_subclass_of_a_loss_may_take_modules():
    class Both(losses.SoftmaxLoss):
        def __init__(self, other):
            super().__init__()
            self.other = other

    assert isinstance(copy.deepcopy(Both(losses.BCELoss())).other, losses.BCELoss)
    with pytest.raises(ValueError, match=r"hf_xmc\.st_losses\.SoftmaxLoss\(model\)"):
        Both(losses.BCELoss()).get_config_dict()
