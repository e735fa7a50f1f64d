"""The Triton kernels give what plain torch gives. They run in Triton's interpreter, on a CPU, at small sizes."""

import logging

import pytest
import torch

from hf_xmc.losses import functional, streaming
from hf_xmc.losses.streaming import score_blocks

LOSSES = ["decoupled_softmax_loss", "softmax_loss"]


@pytest.fixture
def kernels(monkeypatch):
    from hf_xmc.losses.streaming import triton_blocks

    monkeypatch.setattr(triton_blocks, "ROWS", 16)
    monkeypatch.setattr(triton_blocks, "COLUMNS", 32)
    monkeypatch.setattr(triton_blocks, "DEPTH", 16)
    monkeypatch.setattr(triton_blocks, "SPLITS", 2)
    monkeypatch.setattr(streaming, "ENGINE", "triton")
    monkeypatch.setattr(score_blocks, "CHUNK", 64)
    return triton_blocks


@pytest.fixture
def step():
    """19 queries, 101 labels of 21 numbers: no tile divides any of them. Positives at the corners of tiles."""
    generator = torch.Generator().manual_seed(0)
    queries, labels = torch.randn(19, 21, generator=generator), torch.randn(101, 21, generator=generator)
    positives = torch.randint(0, 101, (19, 4), generator=generator)
    positives[0] = torch.tensor([0, 31, 32, 100])
    positives[15, :2], positives[16, :2] = torch.tensor([63, 64]), torch.tensor([63, 64])
    positives[3] = functional.IGNORE_INDEX
    weights = torch.rand(19, 4, generator=generator)
    weights[5, 1:] = 0
    return queries, labels, positives, weights


def value_and_gradients(loss, queries, labels, *arguments, **settings):
    queries, labels = queries.detach().clone().requires_grad_(), labels.detach().clone().requires_grad_()
    value = loss(queries, labels, *arguments, **settings)
    value.backward()
    return value.detach(), queries.grad, labels.grad


def exact(name, queries, labels, positives, weights):
    def dense(queries, labels):
        return getattr(functional, name)(queries @ labels.T, positives, weights)

    return value_and_gradients(dense, queries.double(), labels.double())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("norm", [1.0, 50.0])
def test_value_and_gradients_are_those_of_float64(step, kernels, name, norm):
    queries, labels, positives, weights = step
    queries, labels = norm * queries, norm * labels  # scores of 1e4 with the larger
    expected = exact(name, queries, labels, positives, weights)
    got = value_and_gradients(getattr(streaming, name), queries, labels, positives, weights)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-9)
    for single, double in zip(got[1:], expected[1:], strict=True):
        assert double.norm() > 0
        assert (single.double() - double).norm() <= (1e-6 if norm == 1 else 5e-3) * double.norm()


def test_half_precision_labels_are_scored_in_float32(step, kernels):
    queries, labels, positives, _ = step
    labels = labels.bfloat16()
    expected = exact("decoupled_softmax_loss", queries, labels, positives, None)
    got = value_and_gradients(streaming.decoupled_softmax_loss, queries, labels, positives)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0)
    assert (got[1].double() - expected[1]).norm() <= 1e-6 * expected[1].norm()


def test_positives_that_outweigh_all_negatives_leave_no_trace_in_the_sum(kernels):
    """The positive leads by 60: in float32 nothing is left of the negatives once both are in one sum."""
    labels = torch.eye(40)
    queries = torch.full((1, 40), -30.0)
    queries[0, 7] = 30.0
    got = streaming.decoupled_softmax_loss(queries, labels, torch.tensor([[7]]))
    torch.testing.assert_close(got, 39 * torch.tensor(-60.0).exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_all_labels_positive(step, kernels, num_labels):
    queries, labels, positives, _ = step
    labels, positives = labels[:num_labels], positives % num_labels
    for name in LOSSES:
        expected = exact(name, queries, labels, positives, None)
        got = value_and_gradients(getattr(streaming, name), queries, labels, positives)
        for single, double in zip(got, expected, strict=True):
            torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


def test_the_kernels_did_the_work(step, kernels, monkeypatch):
    """And the losses that have none run in torch, as float64 does."""
    queries, labels, positives, _ = step
    made = []
    arguments = kernels.TritonBlock._arguments
    monkeypatch.setattr(kernels.TritonBlock, "_arguments", lambda self: made.append(self) or arguments(self))
    streaming.soft_top_k_loss(queries, labels, positives, k=5)
    streaming.bce_loss(queries, labels, positives)
    streaming.softmax_loss(queries.double(), labels.double(), positives)
    assert not made
    streaming.softmax_loss(queries, labels, positives)
    assert made


def test_without_triton_a_line_says_what_takes_its_place(monkeypatch, caplog):
    monkeypatch.setattr(streaming, "find_spec", lambda name: None)
    streaming._triton_is_installed.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [streaming._triton_is_installed() for _ in range(2)] == [False, False]
    assert [r.message.split(":")[0] for r in caplog.records] == ["Triton is not installed"]
    streaming._triton_is_installed.cache_clear()


def test_an_engine_that_there_is_not(step, monkeypatch):
    queries, labels, positives, _ = step
    monkeypatch.setattr(streaming, "ENGINE", "cuda")
    with pytest.raises(ValueError, match='must be "auto", "torch" or "triton", got \'cuda\''):
        streaming.softmax_loss(queries, labels, positives)
