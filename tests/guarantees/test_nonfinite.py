"""NaN and infinity are found before they reach weights, a checkpoint or a release, on every process."""

import math

import pytest
import torch
from helpers.losses import LOSSES
from helpers.tiny import LABELS, make_static_encoder
from helpers.training import tiny_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from hf_xmc import XMCModel, XMCTrainer, XMCTrainingArguments
from hf_xmc.losses import streaming
from hf_xmc.tensors import first_non_finite
from hf_xmc.training import checkpoints, nonfinite


class NoGradient(torch.autograd.Function):
    """0, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


class Faulty(XMCTrainer):
    """Breaks what it is told to in the batches of the updates it is told to."""

    def __init__(self, *args, broken=(), what="gradient", **kwargs):
        self.broken, self.what = broken, what
        self.weights = {}  # after each step
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step + 1 not in self.broken:
            return loss
        return loss + (math.inf if self.what == "loss" else NoGradient.apply(self.model[0].embedding.weight.sum()))

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.weights[self.state.global_step] = self.model[0].embedding.weight.detach().clone()
        super()._maybe_log_save_evaluate(*args, **kwargs)


def arguments(folder, **settings):
    return tiny_arguments(folder, **{"max_steps": 5, "save_strategy": "steps", "save_steps": 1, **settings})


@pytest.mark.promise("A NaN or infinite loss or gradient stops the run before weights or checkpoints change")
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_non_finite_update_stops_with_step_rank_and_rows(what, settings, queries, tally, tmp_path):
    args = arguments(tmp_path, **settings)
    trainer = Faulty(make_static_encoder(), args, queries, labels=LABELS, broken=[3], what=what)
    with pytest.raises(FloatingPointError, match=r"^Step 3, rank 0: the loss is .* are the rows \[\d+(, \d+)*\] of"):
        trainer.train()
    assert checkpoints.latest_complete(tmp_path).name == "checkpoint-2"
    assert torch.equal(trainer.model[0].embedding.weight, trainer.weights[2])
    tally(faults=1)


@pytest.mark.promise("A query that embeds to NaN is named by its row")
def test_row_that_embeds_to_nan_is_named(queries, tally, tmp_path):
    encoder = make_static_encoder()
    trainer = Faulty(encoder, arguments(tmp_path, save_strategy="no"), queries, labels=LABELS)
    tokens = [set(encoder.tokenizer.encode(text).ids) for text in queries["text"]]
    only_in_7 = next(iter(tokens[7].difference(*tokens[:7], *tokens[8:])))
    with torch.no_grad():
        encoder[0].embedding.weight[only_in_7] = math.nan
    with pytest.raises(FloatingPointError, match=r"The embeddings of rows \[7\] are not finite") as raised:
        trainer.train()
    assert "The weights themselves are not finite (model.0.embedding.weight)" in str(raised.value)
    tally(faults=1)


@pytest.mark.promise("With `on_nonfinite` set to skip, such an update is skipped and training continues")
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipped_updates_leave_the_weights_unchanged(what, accumulation, queries, tally, tmp_path, caplog):
    args = arguments(tmp_path, on_nonfinite="skip", gradient_accumulation_steps=accumulation, weight_decay=0.1)
    trainer = Faulty(make_static_encoder(), args, queries, labels=LABELS, broken=[1, 3], what=what)
    start = trainer.model[0].embedding.weight.detach().clone()
    trainer.train()
    steps = {0: start, **trainer.weights}
    moved = [not torch.equal(steps[step - 1], steps[step]) for step in range(1, 6)]
    assert moved == [False, True, False, True, True]  # momentum and decay stand still too
    assert caplog.text.count("The update is skipped") == 2
    tally(faults=2)


def test_run_stops_after_ten_skipped_updates(queries, tmp_path):
    args = arguments(tmp_path, on_nonfinite="skip", max_steps=50, save_strategy="no")
    trainer = Faulty(make_static_encoder(), args, queries, labels=LABELS, broken=range(3, 50))
    with pytest.raises(FloatingPointError, match=r"Step 13, .* 10 updates before it were skipped"):
        trainer.train()


def test_unknown_on_nonfinite_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite must be 'stop' or 'skip', got 'ignore'"):
        XMCTrainingArguments("x", use_cpu=True, on_nonfinite="ignore")


def break_unused_token(encoder, value):
    """Of a token that no label has, so that label embeddings stay finite."""
    used = {token for label in LABELS for token in encoder.tokenizer.encode(label).ids}
    unused = max(set(range(len(encoder[0].embedding.weight))) - used)
    with torch.no_grad():
        encoder[0].embedding.weight[unused, 3] = value


@pytest.mark.promise("Weights that are NaN or infinite are neither saved in a checkpoint nor published")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_not_saved(value, queries, tally, tmp_path, caplog):
    encoder = make_static_encoder()
    trainer = XMCTrainer(encoder, arguments(tmp_path / "run", max_steps=1), queries, labels=LABELS)
    trainer.train()
    model = XMCModel(encoder, LABELS)
    model.save_pretrained(tmp_path / "model")
    break_unused_token(encoder, value)
    trainer.state.global_step = 2
    with pytest.raises(FloatingPointError, match=r"weights of step 2 are not finite: model.0.embedding.weight holds"):
        trainer._save_checkpoint(trainer.model, None)
    assert checkpoints.latest_complete(tmp_path / "run").name == "checkpoint-1"
    with pytest.raises(FloatingPointError, match=r"weights of the encoder are not finite: 0.embedding.weight holds"):
        model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert "NaN" not in caplog.text
    assert again.predict("a red boat") == model.predict("a red boat")
    tally(faults=2)


def test_model_with_non_finite_weights_loads_with_a_warning(tmp_path, caplog, monkeypatch):
    encoder = make_static_encoder()
    monkeypatch.setattr("hf_xmc.hub.self_contained.check_finite", lambda *_: None)
    break_unused_token(encoder, math.nan)
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "model")
    XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert "the weights 0.embedding.weight hold NaN or infinity" in caplog.text


def test_finite_weights_whose_sum_overflows_pass():
    big = torch.full((8,), 3e38)
    assert first_non_finite([("a", big), ("ids", torch.ones(3, dtype=torch.long))]) is None
    assert first_non_finite([("a", big), ("b", torch.tensor([1.0, -math.inf]))]) == "b"


class Booleans(TorchDispatchMode):
    """The sizes of the tables of booleans that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.bool:
            self.sizes.append(made.numel())
        return made


def test_finite_weights_are_checked_without_a_mask_of_their_size():
    with Booleans() as made:
        assert first_non_finite([("a", torch.ones(64, 64)), ("b", torch.ones(8))]) is None
    assert set(made.sizes) == {1}


@pytest.mark.promise("A half-precision overflow skips the update and lowers the loss scale; weights stay finite")
def test_overflow_lowers_the_loss_scale_and_leaves_weights_finite(queries, tally, tmp_path, caplog):
    """A scaler whose scale makes gradients overflow, as that of half precision does at its start."""
    args = arguments(tmp_path, save_strategy="no", max_steps=12)
    trainer = Faulty(make_static_encoder(), args, queries, labels=LABELS)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer.model[0].embedding.weight.register_hook(lambda grad: grad.half().float())
    start = trainer.model[0].embedding.weight.detach().clone()
    trainer.train()
    assert 64 < trainer.accelerator.scaler.get_scale() < 2.0**22
    assert torch.equal(trainer.weights[2], start)  # these two overflowed, and one more at least
    assert not torch.equal(trainer.weights[12], start)
    assert trainer.weights[12].isfinite().all()
    tally(faults=2)


def test_run_stops_when_the_loss_scale_cannot_be_lowered(queries, tmp_path):
    args = arguments(tmp_path, save_strategy="no", max_steps=30)
    trainer = Faulty(make_static_encoder(), args, queries, labels=LABELS, broken=range(1, 99))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(FloatingPointError, match=r"^Step 4, rank 0"):
        trainer.train()


@pytest.fixture
def watch():
    """A watch over one layer, whose batches are embeddings."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)

    def make(policy, scaler=None):
        watched = nonfinite.NonFiniteGuard(policy, layer, lambda inputs: inputs["x"])
        step = iter(range(1, 99))

        def update(loss, rows=(0,), **inputs):
            batch = {"x": torch.ones(len(rows), 2), "row": torch.tensor(rows), **inputs}
            watched.add({name: value for name, value in batch.items() if value is not None}, torch.tensor(loss))
            watched.check(1.0, next(step), scaler)

        return update, layer

    return make


def test_error_names_the_rows_of_the_current_update(watch):
    update, _ = watch("stop")
    update(1.0, rows=[1, 2])
    with pytest.raises(FloatingPointError, match=r"Step 2, .* are the rows \[3\] of"):
        update(math.inf, rows=[3])
    with pytest.raises(FloatingPointError, match=r"Step 3, .* are the rows \[\] of"):
        update(math.nan, row=None)


def test_only_consecutive_skipped_updates_stop_the_run(watch):
    update, _ = watch("skip")
    for loss in [math.nan] * 10 + [1.0] + [math.nan] * 10:
        update(loss)
    with pytest.raises(FloatingPointError, match="10 updates before it were skipped"):
        update(math.nan)


def test_non_finite_weights_stop_even_if_updates_are_skipped(watch):
    update, layer = watch("skip")
    with torch.no_grad():
        layer.weight[0, 1] = math.inf
    with pytest.raises(FloatingPointError, match=r"The weights themselves are not finite \(weight\)"):
        update(math.nan)


def test_non_finite_loss_is_not_left_to_the_loss_scaler(watch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.ones(()))
    with pytest.raises(FloatingPointError, match="Step 1"):
        watch("stop", scaler)[0](math.inf)
    update, layer = watch("skip", scaler)
    update(math.inf)
    assert layer.weight.grad is not None  # the scaler looks for what overflowed, and finds no gradient an error
    watch("skip")[0](math.inf)
    assert layer.weight.grad is None


@pytest.mark.promise("Scores of 1e4 and more give the loss and gradient of float64, in float32 and half precision")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [64, 1 << 20])
def test_scores_above_ten_thousand_give_the_loss_and_gradient_of_float64(name, dtype, budget, tally):
    _, dense, streamed, settings = LOSSES[name]
    rng = torch.Generator().manual_seed(0)
    # Small whole numbers, so that scores are exact in every precision, up to 6e4; the last query has no positive.
    queries = torch.randint(-60, 61, (7, 5), generator=rng).to(dtype)
    labels = torch.randint(-200, 201, (11, 5), generator=rng).to(dtype)
    positives = torch.tensor([[0, 3], [4, -100], [10, 9], [1, 1], [5, 2], [8, -100], [-100, -100]])
    exact = queries.double().requires_grad_(), labels.double().requires_grad_()
    scores = exact[0] @ exact[1].T
    assert scores.abs().max() > 1e4
    expected = dense(scores, positives, **settings)
    expected.backward()
    got = queries.requires_grad_(), labels.requires_grad_()
    value = streamed(*got, positives, options=streaming.StreamingOptions(memory_budget=budget), **settings)
    value.backward()
    assert value.isfinite()
    assert value.item() == pytest.approx(expected.item(), rel=1e-2)
    for mine, theirs in zip(got, exact, strict=True):
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-2  # in float32 a score of 6e4, and with it the threshold of soft top-k, is rounded by 4e-3
    tally(inputs=1)
