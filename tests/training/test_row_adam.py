"""Adam with one second moment per row, which leaves rows without a gradient alone."""

import math

import pytest
import torch

from hf_xmc.training.row_adam import RowAdam


def sparse(rows, values, shape):
    """Return a sparse gradient; a row may occur several times."""
    values = torch.as_tensor(values).reshape(len(rows), *shape[1:])
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, shape, check_invariants=True)


def gradients(steps=9, rows=7, width=3, seed=0):
    """Return dense gradients of which most rows are zero, and the rows that are not."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        touched = (torch.rand(rows, generator=draw) < 0.4).nonzero()[:, 0]
        dense = torch.zeros(rows, width)
        dense[touched] = torch.randn(len(touched), width, generator=draw)
        yield dense, touched


def test_three_steps_by_hand():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = RowAdam([weight], lr=0.1, beta=0.9)
    weight.grad = sparse([0], [[3.0, 4.0]], (3, 2))
    optimizer.step()
    first = torch.tensor([-0.3, -0.4]) / math.sqrt(12.5)  # v = 0.1 * 12.5, divided by 1 - 0.9
    torch.testing.assert_close(weight[0], first)
    weight.grad = sparse([1], [[1.0, 1.0]], (3, 2))
    optimizer.step()
    torch.testing.assert_close(weight[1], torch.full((2,), -0.1) / math.sqrt(0.1 / (1 - 0.81)))
    weight.grad = sparse([0], [[1.0, 0.0]], (3, 2))
    optimizer.step()
    moment = 0.9**2 * 1.25 + 0.1 * 0.5  # the step without a gradient counts
    torch.testing.assert_close(weight[0], first - torch.tensor([0.1, 0.0]) / math.sqrt(moment / (1 - 0.729)))
    assert weight[2].tolist() == [0, 0]


@pytest.mark.parametrize("is_sparse", [True, False])
def test_rows_move_as_by_the_dense_formula(is_sparse):
    start = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    weight, expected, moment = torch.nn.Parameter(start.clone()), start.double(), torch.zeros(7, dtype=torch.float64)
    optimizer = RowAdam([weight], lr=0.03, beta=0.95)
    for step, (dense, touched) in enumerate(gradients(), start=1):
        moment = 0.95 * moment + 0.05 * dense.double().square().mean(1)
        expected -= 0.03 * dense.double() / ((moment / (1 - 0.95**step)).sqrt() + 1e-12)[:, None]
        halves = sparse(touched.tolist() * 2, (dense[touched] / 2).repeat(2, 1), dense.shape)
        weight.grad = halves if is_sparse else dense
        optimizer.step()
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_rate_multiplies_the_steps_of_its_row(is_sparse):
    rates = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 3.0, 1.0])
    plain, scaled = torch.nn.Parameter(torch.zeros(7, 3)), torch.nn.Parameter(torch.zeros(7, 3))
    optimizers = [RowAdam([plain], lr=0.03), RowAdam([{"params": [scaled], "row_rates": rates}], lr=0.03)]
    for dense, touched in gradients():
        for weight, optimizer in zip((plain, scaled), optimizers, strict=True):
            weight.grad = sparse(touched.tolist(), dense[touched], dense.shape) if is_sparse else dense.clone()
            optimizer.step()
    torch.testing.assert_close(scaled.detach(), plain.detach() * rates[:, None])


def test_rows_without_a_gradient_stay_bit_for_bit():
    weight = torch.nn.Parameter(torch.randn(7, 3))
    optimizer = RowAdam([weight], lr=0.5)
    for dense, touched in gradients():
        before = weight.detach().clone()
        weight.grad = sparse(touched.tolist(), dense[touched], dense.shape)
        optimizer.step()
        changed = (weight != before).any(1).nonzero()[:, 0]
        assert torch.equal(changed, touched)


def test_scalars_and_vectors_have_a_row_for_each_number():
    scalar, vector = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.zeros(3))
    optimizer = RowAdam([scalar, vector], lr=0.25)
    scalar.grad, vector.grad = torch.tensor(-7.0), torch.tensor([1e-3, 0.0, -50.0])
    optimizer.step()
    assert scalar.item() == pytest.approx(1.25)  # the first step is the learning rate, whatever the gradient
    assert vector.tolist() == pytest.approx([-0.25, 0.0, 0.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(dtype):
    start = torch.randn(7, 3).to(dtype)
    weight = torch.nn.Parameter(start.clone())
    optimizer = RowAdam([weight], lr=0.1)
    for step, (dense, _) in enumerate(gradients()):
        if step == 5:
            other = torch.nn.Parameter(weight.detach().clone())
            resumed = RowAdam([other], lr=99.0)
            optimizer.state[weight]["last_step"][3] = 2**24 + 1  # in float32 an even number
            resumed.load_state_dict(optimizer.state_dict())
            assert resumed.state[other]["last_step"][3] == 2**24 + 1
            optimizer.state[weight]["last_step"][3] = resumed.state[other]["last_step"][3] = 2
        if step >= 5:
            other.grad = dense.to(dtype)
            resumed.step()
        weight.grad = dense.to(dtype)
        optimizer.step()
    assert torch.equal(other, weight)
    assert not torch.equal(other, start)


def test_a_closure_is_called_and_its_loss_returned():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = RowAdam([weight], lr=0.5)

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2
    assert weight.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"beta": 0.0}, "beta must be between 0 and 1, got 0.0"),
        ({"beta": 1.0}, "beta must be between 0 and 1, got 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        RowAdam([torch.nn.Parameter(torch.ones(1))], **settings)
