"""The Triton kernels give what plain torch gives. They run in Triton's interpreter, on a CPU, at small sizes."""

import logging

import pytest
import torch

from hf_xmc.losses import functional, streaming
from hf_xmc.losses.streaming import StreamingOptions, driver, score_blocks, triton_check
from hf_xmc.losses.streaming.triton_blocks import Tile

LOSSES = ["decoupled_softmax_loss", "softmax_loss"]
TRITON = StreamingOptions(engine="triton")
TILE = Tile(rows=32, columns=64, depth=16, warps=4, stages=1)  # two by two of the tiles by which pairs are sorted


@pytest.fixture
def kernels(monkeypatch):
    from hf_xmc.losses.streaming import triton_blocks

    monkeypatch.setattr(triton_blocks, "PAIR_ROWS", 16)
    monkeypatch.setattr(triton_blocks, "PAIR_COLUMNS", 32)
    monkeypatch.setattr(triton_blocks, "FLOAT32_TILES", (TILE,))
    monkeypatch.setattr(triton_blocks, "HALF_TILES", (TILE,))
    monkeypatch.setattr(triton_blocks, "SPLITS", 2)
    monkeypatch.setattr(triton_blocks, "chosen", {})
    monkeypatch.setattr(triton_blocks, "refused", set())
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
def test_triton_value_and_gradients_equal_those_of_float64(step, kernels, name, norm):
    queries, labels, positives, weights = step
    queries, labels = norm * queries, norm * labels  # scores of 1e4 with the larger
    expected = exact(name, queries, labels, positives, weights)
    got = value_and_gradients(getattr(streaming, name), queries, labels, positives, weights, options=TRITON)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-9)
    for single, double in zip(got[1:], expected[1:], strict=True):
        assert double.norm() > 0
        assert (single.double() - double).norm() <= (1e-6 if norm == 1 else 5e-3) * double.norm()


def test_half_precision_labels_are_scored_in_float32(step, kernels):
    queries, labels, positives, _ = step
    labels = labels.bfloat16()
    expected = exact("decoupled_softmax_loss", queries, labels, positives, None)
    got = value_and_gradients(streaming.decoupled_softmax_loss, queries, labels, positives, options=TRITON)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0)
    assert (got[1].double() - expected[1]).norm() <= 1e-6 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_of_both_is_exact_in_float32(step, kernels, name, dtype):
    """Queries are multiplied as they are: scaled first, they would lose bits in bfloat16."""
    queries, labels, positives, weights = step
    queries, labels = queries.to(dtype), labels.to(dtype)
    expected = exact(name, queries, labels, positives, weights)
    got = value_and_gradients(getattr(streaming, name), queries, labels, positives, weights, options=TRITON)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=0)
    for half, double in zip(got[1:], expected[1:], strict=True):
        assert (half.double() - double).norm() <= torch.finfo(dtype).eps * double.norm()  # rounded once, at the end
    (case, *_), *others = kernels.chosen
    assert (case.is_half, others) == (True, [])


def test_dominant_positive_does_not_distort_the_sum_of_negatives(kernels):
    """The positive leads by 60: in float32 nothing is left of the negatives once both are in one sum."""
    labels = torch.eye(40)
    queries = torch.full((1, 40), -30.0)
    queries[0, 7] = 30.0
    got = streaming.decoupled_softmax_loss(queries, labels, torch.tensor([[7]]), options=TRITON)
    torch.testing.assert_close(got, 39 * torch.tensor(-60.0).exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_triton_losses_allow_all_labels_as_positives(step, kernels, num_labels):
    queries, labels, positives, _ = step
    labels, positives = labels[:num_labels], positives % num_labels
    for name in LOSSES:
        expected = exact(name, queries, labels, positives, None)
        got = value_and_gradients(getattr(streaming, name), queries, labels, positives, options=TRITON)
        for single, double in zip(got, expected, strict=True):
            torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


def test_triton_engine_runs_the_kernels(step, kernels, monkeypatch):
    """And the losses that have none run in torch, as float64 does."""
    queries, labels, positives, _ = step
    made = []
    arguments = kernels.TritonBlock._arguments
    monkeypatch.setattr(kernels.TritonBlock, "_arguments", lambda self: made.append(self) or arguments(self))
    streaming.soft_top_k_loss(queries, labels, positives, k=5, options=TRITON)
    streaming.bce_loss(queries, labels, positives, options=TRITON)
    streaming.softmax_loss(queries.double(), labels.double(), positives, options=TRITON)
    assert not made
    streaming.softmax_loss(queries, labels, positives, options=TRITON)
    assert made


@pytest.fixture
def on_gpu(kernels, monkeypatch, caplog):
    """Everything is on a GPU whose kernels have not been used yet, at a size for the interpreter."""
    monkeypatch.setattr(driver, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(triton_check, "ROWS", 19)
    monkeypatch.setattr(triton_check, "EXTRA_COLUMNS", 37)
    triton_check.kernels_work.cache_clear()
    triton_check._warn.cache_clear()
    caplog.set_level(logging.WARNING)
    yield kernels
    triton_check.kernels_work.cache_clear()
    triton_check._warn.cache_clear()


def losses_of(step):
    """Both losses twice, without and with halved precision, and whether Triton computed any of them."""
    queries, labels, positives, weights = step
    exacts, gots = [], []
    for name in LOSSES * 2:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = queries.to(dtype), labels.to(dtype), positives, weights
            exacts.append(exact(name, *inputs))
            gots.append(value_and_gradients(getattr(streaming, name), *inputs))
    for got, expected in zip(gots, exacts, strict=True):
        torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=0)
        assert (got[2].double() - expected[2]).norm() <= 1e-2 * expected[2].norm()


def test_kernels_are_used_on_a_gpu_after_a_check(step, on_gpu, caplog):
    losses_of(step)
    assert {case.is_half for case, *_ in on_gpu.chosen} == {False, True}
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify one"), "RuntimeError: Failed to find C compiler."),
        (AssertionError(), "AssertionError: no message"),
    ],
)
def test_kernels_that_do_not_compile_are_replaced_with_one_warning(step, on_gpu, monkeypatch, caplog, error, told):
    class Broken:
        def __getitem__(self, grid):
            raise error

    monkeypatch.setattr(on_gpu, "exponentials_kernel", Broken())
    losses_of(step)
    assert not on_gpu.chosen
    (record,) = caplog.records
    assert record.message == (
        f"The Triton kernels do not run on cpu ({told}), so losses run in plain torch, which is exact and slower."
    )


@pytest.mark.parametrize("wrong", ["value", "gradient of queries", "mask"])
def test_kernels_that_give_other_results_are_replaced_with_one_warning(step, on_gpu, monkeypatch, caplog, wrong):
    block = on_gpu.TritonBlock
    if wrong == "value":
        real = block._max_and_sum
        monkeypatch.setattr(
            block, "_max_and_sum", lambda self, tile: (real(self, tile)[0], 1.001 * real(self, tile)[1])
        )
    elif wrong == "mask":
        monkeypatch.setattr(block, "mask_", lambda self, rows, columns: None)
    else:
        made = block.exponentials
        monkeypatch.setattr(
            block, "exponentials", lambda self, top: ((n, e.roll(1, 1), factor) for n, e, factor in made(self, top))
        )
    losses_of(step)
    assert not on_gpu.chosen, "they were used"
    (record,) = caplog.records
    assert record.message.startswith("The Triton kernels give other results than plain torch on cpu (")
    assert ("value" if wrong != "gradient of queries" else wrong) in record.message


def test_tiles_that_do_not_fit_are_left_out(step, on_gpu, monkeypatch, caplog):
    """And if none fits, plain torch is used."""
    large = TILE._replace(columns=32)
    monkeypatch.setattr(on_gpu, "FLOAT32_TILES", (large, TILE))
    monkeypatch.setattr(on_gpu, "HALF_TILES", (large,))
    made = on_gpu.TritonBlock._constants

    def constants(self, tile):
        if tile == large:
            raise on_gpu.OutOfResources(300_000, 232_448, "shared memory")
        return made(self, tile)

    monkeypatch.setattr(on_gpu.TritonBlock, "_constants", constants)
    losses_of(step)
    assert {tile for _, tile in on_gpu.refused} == {large}
    assert {case.is_half for case, *_ in on_gpu.chosen} == {False}
    assert set(on_gpu.chosen.values()) == {TILE}
    (record,) = caplog.records
    assert "no tile fits into the shared memory" in record.message


def test_fastest_tile_is_chosen_by_measurement(step, kernels, monkeypatch):
    slow, fast = TILE._replace(columns=32), TILE
    monkeypatch.setattr(kernels, "FLOAT32_TILES", (slow, fast))
    measured = []
    monkeypatch.setattr(kernels, "do_bench", lambda launch: measured.append(launch()) or 3 - len(measured))
    queries, labels, *_ = step
    block = kernels.TritonBlock(queries, labels, None, score_blocks.ScoreBuffers(19, queries, labels, None))
    monkeypatch.setattr(kernels, "is_measurable", lambda labels: True)
    found = block.max_and_sum()
    assert list(kernels.chosen.values()) == [fast]
    for got in measured:
        torch.testing.assert_close(got, found)
    block.max_and_sum()
    assert len(measured) == 2


def test_missing_triton_is_reported_with_its_replacement(monkeypatch, caplog):
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    driver.triton_is_installed.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [driver.triton_is_installed() for _ in range(2)] == [False, False]
    assert [r.message.split(",")[0] for r in caplog.records] == ["Triton is not installed"]
    driver.triton_is_installed.cache_clear()


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match='`engine` must be "auto", "torch" or "triton", got \'cuda\''):
        StreamingOptions(engine="cuda")
