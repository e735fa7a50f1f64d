"""The streamed losses are the plain ones: same value, same gradient, whatever the sizes of blocks and chunks."""

import pytest
import torch

from hf_xmc import functional, streaming

PAD = functional.IGNORE_INDEX
LOSSES = {
    "decoupled_softmax_loss": {},
    "softmax_loss": {},
    "bce_loss": {"bias": -1.5, "scale": 2.0},
    "soft_top_k_loss": {"k": 5, "alpha": 2.0},
}
WHOLE_ROWS, CHUNKS = 2**28, 7 * 100 * 8  # bytes: the second holds 7 queries against 100 labels


@pytest.fixture
def step(monkeypatch):
    """11 queries, 457 labels, every odd row; chunks of 100 labels do not divide them."""
    monkeypatch.setattr(streaming, "CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(11, 6, dtype=torch.float64, generator=generator)
    labels = torch.randn(457, 6, dtype=torch.float64, generator=generator)
    positives = torch.randint(0, 457, (11, 4), generator=generator)
    positives[1] = PAD
    positives[2, 1:] = PAD
    positives[3, 3] = positives[3, 0]
    positives[4, 0] = 456
    weights = torch.rand(11, 4, generator=generator)
    weights[5, 1:] = 0
    weights[6] = 0
    return queries, labels, positives, weights


def value_and_gradients(loss, queries, labels, *arguments, **settings):
    queries, labels = queries.detach().clone().requires_grad_(), labels.detach().clone().requires_grad_()
    value = loss(queries, labels, *arguments, **settings)
    (3 * value).backward()
    return value.detach(), queries.grad, labels.grad


def plain(name):
    return lambda queries, labels, *rest, **settings: getattr(functional, name)(queries @ labels.T, *rest, **settings)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("memory_budget", [WHOLE_ROWS, CHUNKS], ids=["whole rows", "chunks"])
def test_streaming_changes_memory_and_nothing_else(step, name, weighted, memory_budget):
    queries, labels, positives, weights = step
    settings = dict(LOSSES[name], weights=weights if weighted else None)
    expected = value_and_gradients(plain(name), queries, labels, positives, **settings)
    assert expected[1].abs().sum() > 0, "nothing to learn: the comparison is empty"
    settings["memory_budget"] = memory_budget
    got = value_and_gradients(getattr(streaming, name), queries, labels, positives, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("memory_budget", [WHOLE_ROWS, CHUNKS], ids=["whole rows", "chunks"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_few_labels(step, name, memory_budget, num_labels):
    """All labels positive, k above their number, fewer labels than a chunk."""
    queries, labels, positives, _ = step
    labels, positives = labels[:num_labels], positives % num_labels
    expected = value_and_gradients(plain(name), queries, labels, positives, **LOSSES[name])
    got = value_and_gradients(
        getattr(streaming, name), queries, labels, positives, **LOSSES[name], memory_budget=memory_budget
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("norm", [1.0, 100.0])
def test_float32_is_close_to_float64_even_at_scores_of_ten_thousand(step, name, norm):
    queries, labels, positives, _ = step
    queries, labels = norm * queries, norm * labels
    exact = value_and_gradients(plain(name), queries, labels, positives, **LOSSES[name])
    got = value_and_gradients(getattr(streaming, name), queries.float(), labels.float(), positives, **LOSSES[name])
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-9)
    for single, double in zip(got[1:], exact[1:], strict=True):
        assert (single.double() - double).norm() <= 5e-3 * double.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_scored_in_float32(step, dtype):
    queries, labels, positives, _ = step
    queries, labels = queries.to(dtype), labels.to(dtype)
    got = value_and_gradients(streaming.decoupled_softmax_loss, queries, labels, positives)
    expected = value_and_gradients(streaming.decoupled_softmax_loss, queries.float(), labels.float(), positives)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2].to(dtype))


def test_autocast_does_not_reach_the_scores(step):
    queries, labels, positives, _ = step
    queries, labels = queries.float(), labels.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = streaming.decoupled_softmax_loss(queries, labels, positives)
    assert torch.equal(inside, streaming.decoupled_softmax_loss(queries, labels, positives))


def test_bias_and_scale_of_bce_receive_gradients(step):
    queries, labels, positives, _ = step

    def gradients(loss):
        bias, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.5, 2.0))
        loss(queries, labels, positives, bias=bias, scale=scale).backward()
        return bias.grad, scale.grad

    torch.testing.assert_close(gradients(streaming.bce_loss), gradients(plain("bce_loss")))


def test_bad_shapes_say_what_was_got():
    with pytest.raises(ValueError, match=r"queries has shape \(2, 3\) and labels \(4, 5\)"):
        streaming.softmax_loss(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="label id 4, but there are only 4 labels"):
        streaming.softmax_loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.full((2, 1), 4))
