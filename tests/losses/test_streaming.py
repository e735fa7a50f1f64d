"""The streamed losses have the value and gradient of the dense ones, for any size of blocks and chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_xmc.losses import functional, streaming
from hf_xmc.losses.streaming import StreamingOptions, driver, score_blocks

PAD = functional.IGNORE_INDEX
LOSSES = {
    "decoupled_softmax_loss": {},
    "softmax_loss": {},
    "bce_loss": {"bias": -1.5, "scale": 2.0},
    "soft_top_k_loss": {"k": 5, "alpha": 2.0},
}
WHOLE_ROWS, CHUNKS = 2**28, 7 * 100 * 8  # bytes: the second holds 7 queries against 100 labels


@pytest.fixture(params=["whole rows", "blocks", "chunks"])
def memory_budget(request, monkeypatch):
    """11 queries at once, in blocks of 4, 4 and 3 that keep their rows, and in blocks of 6 and 5 that do not."""
    if request.param == "blocks":
        monkeypatch.setattr(driver, "MAX_BLOCK", 4)
    return CHUNKS if request.param == "chunks" else WHOLE_ROWS


@pytest.fixture
def step(monkeypatch):
    """11 queries, 457 labels, every odd row; chunks of 100 labels do not divide them."""
    monkeypatch.setattr(score_blocks, "CHUNK", 100)
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
def test_streamed_loss_equals_the_dense_loss(step, name, weighted, memory_budget):
    queries, labels, positives, weights = step
    settings = dict(LOSSES[name], weights=weights if weighted else None)
    expected = value_and_gradients(plain(name), queries, labels, positives, **settings)
    assert expected[1].abs().sum() > 0, "nothing to learn: the comparison is empty"
    settings["options"] = StreamingOptions(memory_budget=memory_budget)
    got = value_and_gradients(getattr(streaming, name), queries, labels, positives, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_streamed_loss_equals_the_dense_loss_for_few_labels(step, name, memory_budget, num_labels):
    """All labels positive, k above their number, fewer labels than a chunk."""
    queries, labels, positives, _ = step
    labels, positives = labels[:num_labels], positives % num_labels
    expected = value_and_gradients(plain(name), queries, labels, positives, **LOSSES[name])
    got = value_and_gradients(
        getattr(streaming, name),
        queries,
        labels,
        positives,
        **LOSSES[name],
        options=StreamingOptions(memory_budget=memory_budget),
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


class Created(TorchDispatchMode):
    """Precision and size of the memory that operations take, beside that of tensors known before."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr(): tensor for tensor in known}
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        for tensor in (r for r in tree_leaves(result) if isinstance(r, torch.Tensor) and r.numel()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known[storage.data_ptr()] = tensor  # kept alive: no address is used twice
                self.sizes.append((tensor.dtype, storage.nbytes() // tensor.itemsize))
        return result


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_loss_holds_neither_score_matrix_nor_label_copy(step, name, dtype):
    queries, labels, positives, _ = step
    queries, labels = queries.float().requires_grad_(), labels.to(dtype).requires_grad_()
    with Created(queries, labels) as forward:
        value = getattr(streaming, name)(
            queries, labels, positives, **LOSSES[name], options=StreamingOptions(memory_budget=CHUNKS)
        )
    assert (torch.float32, labels.numel()) in forward.sizes, "the gradient of the labels"
    assert sum(size >= labels.numel() for _, size in forward.sizes) == 1 < len(queries) * len(labels) / labels.numel()
    with Created(*forward.known.values()) as backward:
        torch.autograd.grad(value, [queries, labels])
    assert (labels.numel() in [size for _, size in backward.sizes]) == (dtype == torch.bfloat16), "converted at the end"


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_dtype_leaves_the_value_unchanged(step, name, memory_budget):
    queries, labels, positives, _ = step
    arguments = queries.float(), labels.float(), positives
    exact, got = (
        value_and_gradients(
            getattr(streaming, name),
            *arguments,
            **LOSSES[name],
            options=StreamingOptions(memory_budget=memory_budget, gradient_dtype=dtype),
        )
        for dtype in (None, torch.bfloat16)
    )
    torch.testing.assert_close(got[0], exact[0], rtol=1e-6, atol=0)
    for low, full in zip(got[1:], exact[1:], strict=True):
        assert 1e-5 * full.norm() < (low - full).norm() < 1e-2 * full.norm()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gradient_dtype", [None, torch.bfloat16])
def test_low_precision_of_the_scores_costs_little_precision_of_value_and_gradient(
    step, name, memory_budget, gradient_dtype
):
    queries, labels, positives, _ = step
    arguments = queries.float(), labels.float(), positives
    exact, got = (
        value_and_gradients(
            getattr(streaming, name),
            *arguments,
            **LOSSES[name],
            options=StreamingOptions(memory_budget=memory_budget, score_dtype=dtype, gradient_dtype=gradient_dtype),
        )
        for dtype in (None, torch.bfloat16)
    )
    for low, full in zip(got, exact, strict=True):
        assert 0 < (low - full).norm() < 2e-2 * full.norm()


def test_scores_of_positives_stay_exact_in_low_precision():
    """With one label, all of the loss is the score of the positive."""
    queries, labels = torch.full((1, 4), 1.001), torch.full((1, 4), 0.998)
    positives = torch.tensor([[0]])
    options = StreamingOptions(score_dtype=torch.bfloat16)
    value = streaming.bce_loss(queries, labels, positives, options=options)
    torch.testing.assert_close(value, torch.nn.functional.softplus(torch.tensor(-4 * 1.001 * 0.998)), rtol=1e-6, atol=0)


def test_low_precision_of_the_scores_is_for_all_texts_of_a_label(step):
    queries, labels, positives, _ = step
    counts = torch.tensor([2] * (len(labels) // 2) + [1] * (len(labels) % 2))
    arguments = queries.float(), labels.float(), positives.clamp(max=len(counts) - 1)
    low, full = (
        streaming.decoupled_softmax_loss(*arguments, options=StreamingOptions(text_counts=counts, score_dtype=dtype))
        for dtype in (torch.bfloat16, None)
    )
    assert 0 < (low - full).abs() < 1e-2 * full


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score_dtype": torch.float16}, "`score_dtype` must be None or torch.bfloat16, got torch.float16"),
        ({"gradient_dtype": torch.float16}, "`gradient_dtype` must be None or torch.bfloat16, got torch.float16"),
        ({"score_dtype": torch.bfloat16, "engine": "triton"}, '`score_dtype` must be None with engine="triton"'),
    ],
)
def test_a_precision_that_is_not_there_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        StreamingOptions(**settings)


@pytest.mark.parametrize("k", [0.3, 1, 2.5, 20, 100, 300, 456, 457, 500])
def test_streamed_soft_top_k_equals_the_dense_one_for_any_k(step, k, memory_budget):
    """Where ``2 k`` labels are listed one by one, some of them, and all."""
    queries, labels, positives, weights = step
    settings = {"k": k, "alpha": 2.0, "weights": weights}
    expected = value_and_gradients(plain("soft_top_k_loss"), queries, labels, positives, **settings)
    got = value_and_gradients(
        streaming.soft_top_k_loss,
        queries,
        labels,
        positives,
        **settings,
        options=StreamingOptions(memory_budget=memory_budget),
    )
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (5, 2.0), (5, 20.0), (100, 1.0)])
def test_threshold_of_soft_top_k_takes_few_passes_over_the_labels(step, k, alpha, monkeypatch):
    walks = []
    scores = score_blocks.ScoreBlock.scores
    monkeypatch.setattr(score_blocks.ScoreBlock, "scores", lambda self: walks.append(self) or scores(self))
    queries, labels, positives, _ = step
    streaming.soft_top_k_loss(queries.float(), labels.float(), positives, k=k, alpha=alpha)
    assert 3 <= len(walks) <= 5  # for the list, for the start, and one to three Newton steps


def test_backward_runs_only_once(step):
    queries, labels, positives, _ = step
    queries.requires_grad_()
    loss = streaming.softmax_loss(queries, labels, positives)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Call the loss again"):
        loss.backward()


def test_autocast_does_not_change_the_scores(step):
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


def test_invalid_shapes_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"`queries` and `labels` .* got \(2, 3\) and \(4, 5\)"):
        streaming.softmax_loss(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`gradient_dtype` must be None or torch.bfloat16, got torch.float16"):
        StreamingOptions(gradient_dtype=torch.float16)
    with pytest.raises(ValueError, match="label id 4, but there are only 4 labels"):
        streaming.softmax_loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.full((2, 1), 4))


def of_labels(scores, text_counts):
    """``(B, L)``, the best of each label's texts."""
    return torch.stack([texts.max(1).values for texts in scores.split(text_counts.tolist(), dim=1)], dim=1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_label_with_several_texts_scores_as_the_best_of_them(step, name, weighted, memory_budget):
    """Of 117 labels with one to four texts, and one with more texts than a chunk holds."""
    queries, labels, positives, weights = step
    text_counts = torch.arange(117) * 7 % 4 + 1
    text_counts[58] = 130
    labels, positives = labels[: text_counts.sum()], torch.where(positives == PAD, PAD, positives % 117)
    assert len(labels) == text_counts.sum() > 3 * 117
    settings = dict(LOSSES[name], weights=weights if weighted else None)

    def plain_of_labels(queries, labels, *rest, **settings):
        return getattr(functional, name)(of_labels(queries @ labels.T, text_counts), *rest, **settings)

    expected = value_and_gradients(plain_of_labels, queries, labels, positives, **settings)
    settings["options"] = StreamingOptions(memory_budget=memory_budget, text_counts=text_counts)
    got = value_and_gradients(getattr(streaming, name), queries, labels, positives, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    assert (got[2] == 0).all(1).any(), "every text is the best one for some query"


@pytest.mark.parametrize("name", LOSSES)
def test_one_text_per_label_gives_the_plain_loss(step, name, memory_budget):
    queries, labels, positives, weights = step
    expected, got = (
        value_and_gradients(
            getattr(streaming, name),
            queries,
            labels,
            positives,
            weights=weights,
            **LOSSES[name],
            options=StreamingOptions(memory_budget=memory_budget, text_counts=text_counts),
        )
        for text_counts in (None, torch.ones(len(labels), dtype=torch.long))
    )
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_first_of_equal_texts_gets_the_full_gradient(step, name):
    queries, labels, positives, _ = step
    twice = labels[:40].repeat_interleave(2, dim=0)
    arguments = queries, twice, torch.where(positives == PAD, PAD, positives % 40)
    once = value_and_gradients(getattr(streaming, name), queries, labels[:40], arguments[2], **LOSSES[name])
    text_counts = torch.full((40,), 2)
    got = value_and_gradients(
        getattr(streaming, name), *arguments, **LOSSES[name], options=StreamingOptions(text_counts=text_counts)
    )
    torch.testing.assert_close((*got[:2], got[2][::2]), once, rtol=1e-8, atol=1e-9)
    assert not got[2][1::2].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("text", [0, 1])
def test_nan_text_makes_the_loss_or_gradient_nan(step, name, text):
    queries, labels, positives, _ = step
    labels[100 + text] = torch.nan
    labels, positives = labels[:456], torch.where(positives == PAD, PAD, positives % 228)
    text_counts = torch.full((228,), 2)
    got = value_and_gradients(
        getattr(streaming, name),
        queries,
        labels,
        positives,
        **LOSSES[name],
        options=StreamingOptions(text_counts=text_counts),
    )
    assert any(not part.isfinite().all() for part in got)


@pytest.mark.parametrize(
    ("text_counts", "said"),
    [([2, 3], "got a sum of 5 and a minimum of 2"), ([4, 0], "got a sum of 4 and a minimum of 0")],
)
def test_invalid_text_counts_are_refused(text_counts, said):
    arguments = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"add up to the 4 rows of `labels`, {said}"):
        streaming.softmax_loss(*arguments, options=StreamingOptions(text_counts=torch.tensor(text_counts)))
