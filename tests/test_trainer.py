"""A step of the trainer is the gradient of the formula; a run that stops goes on as if it had not."""

import copy

import pytest
import torch
from conftest import (
    LABELS,
    make_bert,
    make_bert_encoder,
    make_router,
    make_router_with_frozen_labels,
    make_static_encoder,
)
from datasets import Dataset
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import (
    ExtremeMultilabelClassificationEvaluator,
    HardNegativeMiner,
    XMCData,
    XMCTrainer,
    XMCTrainingArguments,
    losses,
    st_losses,
)
from hf_xmc.losses import functional

LOSSES = {
    "decoupled": (losses.DecoupledSoftmaxLoss(0.7), lambda s, p, w: functional.decoupled_softmax_loss(s / 0.7, p, w)),
    "softmax": (losses.SoftmaxLoss(), functional.softmax_loss),
    "soft top-k": (losses.SoftTopKLoss(k=3), lambda s, p, w: functional.soft_top_k_loss(s, p, 3, weights=w)),
    "bce": (losses.BCELoss(-3.0), lambda s, p, w: functional.bce_loss(s, p, w, bias=-3.0)),
}


class Recording(XMCTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def compute_loss(self, model, inputs, *rest, **kwargs):
        self.batches.append(copy.deepcopy(inputs))
        return super().compute_loss(model, inputs, *rest, **kwargs)


def arguments(folder, **settings):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 5,
        "learning_rate": 0.05,
    }
    return XMCTrainingArguments(str(folder), **{**defaults, **settings})


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("still"), dropout=0.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("kind", "label_chunk_size", "accumulation"),
    [("static", None, 1), ("static", 4, 2), ("bert", 100, 1), ("bert", 4, 1), ("bert", 3, 2)],
)
@pytest.mark.parametrize("mode", ["exact", "fresh"])
def test_a_step_is_the_gradient_of_the_formula(
    name, kind, label_chunk_size, accumulation, mode, queries, still_bert, tmp_path
):
    """Of all labels, and of a sample that holds them all."""
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)
    exact = copy.deepcopy(encoder).double()
    loss, formula = LOSSES[name]
    rows = queries.add_column("label_scores", [[1.0 + i % 2 for i in ids] for ids in queries["label_ids"]])
    args = arguments(
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        label_chunk_size=label_chunk_size,
        label_mode=mode,
        label_sample_share=1.0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer = Recording(encoder, args, rows, labels=LABELS, loss=copy.deepcopy(loss))
    trainer.train()

    assert len(trainer.batches) == accumulation
    for batch in trainer.batches:
        (features,), positives = trainer.collect_features(batch)
        embedded = exact(features)["sentence_embedding"]
        labels = exact(exact.preprocess(LABELS))["sentence_embedding"]
        value = formula(embedded @ labels.T, positives, batch["label_weights"].double())
        (value / accumulation).backward()
    for (parameter, after), before in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        expected = before if before.grad is None else before - before.grad
        torch.testing.assert_close(
            after.double(), expected, rtol=1e-4, atol=2e-5, msg=lambda text, parameter=parameter: f"{parameter}: {text}"
        )
    assert max(float(p.grad.norm()) for p in exact.parameters() if p.grad is not None) > 0.01


def run(encoder, folder, queries, resume=None, loss=losses.BCELoss, **settings):
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=1, **settings)
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, loss=loss())
    if args.label_mode == "mined":
        trainer.add_callback(HardNegativeMiner(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}


MODES = {
    "exact": {},
    "fresh": {"label_sample_share": 0.3},
    "bank": {"label_sample_share": 0.3, "label_bank_max_age": 5, "loss": losses.DecoupledSoftmaxLoss},
    "mined": {"num_hard_negatives": 2, "num_random_negatives": 2, "num_positives": 1, "loss": losses.SoftmaxLoss},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("accumulation", "step"), [(1, 3), (1, 4), (2, 4)])  # 3 batches an epoch: at its end, within
def test_a_resumed_run_ends_bit_for_bit_where_the_other_did(mode, accumulation, step, queries, bert_folder, tmp_path):
    """Dropout on, and with a bias, a bank or a shortlist that no file of the encoder holds."""
    settings = {
        "gradient_accumulation_steps": accumulation,
        "label_chunk_size": 4,
        "label_mode": mode,
        **MODES[mode],
    }
    whole = run(make_bert_encoder(bert_folder), tmp_path / "whole", queries, **settings)
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    resumed = run(make_bert_encoder(bert_folder), tmp_path / "resumed", queries, resume=str(checkpoint), **settings)
    assert whole.get("bias") != -10
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_a_checkpoint_of_another_mode_is_refused(queries, bert_folder, tmp_path):
    run(make_bert_encoder(bert_folder), tmp_path / "a", queries, loss=losses.SoftmaxLoss)
    with pytest.raises(ValueError, match=r"has no negatives-0.safetensors: it was saved with another label_mode"):
        run(
            make_bert_encoder(bert_folder),
            tmp_path / "b",
            queries,
            resume=str(tmp_path / "a" / "checkpoint-3"),
            label_mode="bank",
            loss=losses.SoftmaxLoss,
        )


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank"])
def test_a_scaled_loss_has_the_scaled_gradient(mode, queries, still_bert, tmp_path):
    """As a GradScaler does it, and where a gradient overflows it stays no number: the step is skipped."""
    args = arguments(tmp_path, label_mode=mode, label_sample_share=1.0, label_chunk_size=4)
    trainer = XMCTrainer(make_bert_encoder(still_bert), args, queries, labels=LABELS)
    batch = next(iter(trainer.get_train_dataloader()))

    def gradients(scale):
        trainer.model.zero_grad()
        (trainer.compute_loss(trainer.model, batch) * scale).backward()
        return {name: p.grad / scale for name, p in trainer.model.named_parameters() if p.grad is not None}

    expected, scaled = gradients(1.0), gradients(2.0**16)
    assert sum(float(g.norm()) for g in expected.values()) > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(scaled[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    overflown = gradients(float("inf"))
    assert not all(bool(g.isfinite().all()) for g in overflown.values())


@pytest.mark.parametrize("mode", ["exact", "fresh"])
def test_bf16_autocast_reaches_both_passes_over_the_labels(mode, queries, still_bert, tmp_path):
    """No further from float32 than the whole step in one graph is, in the same precision."""

    def gradient(mode, **settings):
        args = arguments(tmp_path, label_mode=mode, label_sample_share=1.0, **settings)
        trainer = XMCTrainer(make_bert_encoder(still_bert), args, queries, labels=LABELS)
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.accelerator.prepare_model(trainer.model)  # where accelerate adds the autocast
        seen = []
        model[0].auto_model.encoder.layer[0].output.register_forward_hook(lambda m, i, o: seen.append(i[0].dtype))
        trainer.compute_loss(model, batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), seen

    exact, _ = gradient("exact")
    plain, seen = gradient("exact", bf16=True, label_chunk_size=100)
    assert set(seen) == {torch.bfloat16}
    cached, seen = gradient(mode, bf16=True, label_chunk_size=4)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 1 + 2 * 3 + (mode == "fresh")  # queries once, three chunks of labels twice, and one look
    assert 0 < (plain - exact).norm() < 0.05 * exact.norm()
    assert (cached - exact).norm() < 2 * (plain - exact).norm()


def test_the_best_checkpoint_is_the_one_kept(queries, tmp_path):
    data = XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS}), validation=queries)
    args = arguments(
        tmp_path,
        num_train_epochs=4,
        learning_rate=3.0,  # too high on purpose: later epochs are worse than some earlier one
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="P@5",
    )
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(data, "validation")
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, evaluator=evaluator)
    trainer.train()
    seen = [entry["eval_P@5"] for entry in trainer.state.log_history if "eval_P@5" in entry]
    assert len(seen) == 4
    assert evaluator(trainer.model)["P@5"] == max(seen) == trainer.state.best_metric


@pytest.mark.parametrize("mode", ["exact", "fresh"])
def test_a_tower_for_labels_is_trained_with_the_one_for_queries(mode, queries, still_bert, tmp_path):
    encoder = make_router(still_bert)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = arguments(tmp_path, label_mode=mode, max_steps=2, label_chunk_size=4, router_mapping={"text": "query"})
    XMCTrainer(encoder, args, queries, labels=LABELS).train()
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert {tower for name in moved for tower in ("query", "document") if tower in name} == {"query", "document"}


def test_a_bank_gives_the_tower_for_queries_the_gradient_of_all_labels(queries, still_bert, tmp_path):
    gradients = {}
    for mode in ("exact", "bank"):
        encoder = make_router(still_bert)
        args = arguments(tmp_path, label_mode=mode, label_sample_share=0.2, router_mapping={"text": "query"})
        trainer = XMCTrainer(encoder, args, queries.select([0, 2, 4, 7, 9]), labels=LABELS)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(encoder.eval(), inputs).backward()
        tower = [p for name, p in encoder.named_parameters() if "query" in name and p.grad is not None]
        gradients[mode] = torch.cat([p.grad.flatten() for p in tower])
    difference = (gradients["bank"] - gradients["exact"]).norm()
    assert difference < 0.01 * gradients["exact"].norm()  # the bank is in bfloat16


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_a_batch_whose_queries_have_no_label_is_passed_over(mode, queries, bert_folder, tmp_path):
    queries = Dataset.from_dict({"text": ["a boat", "a car"], "label_ids": [[], []]}).cast(queries.features)
    encoder = make_bert_encoder(bert_folder)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = arguments(tmp_path, label_mode=mode, max_steps=2, per_device_train_batch_size=1)
    XMCTrainer(encoder, args, queries, labels=LABELS).train()
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_a_tower_for_labels_may_be_frozen(mode, queries, still_bert, tmp_path):
    encoder = make_router_with_frozen_labels(still_bert)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = arguments(tmp_path, label_mode=mode, max_steps=2, router_mapping={"text": "query"})
    XMCTrainer(encoder, args, queries, labels=LABELS).train()
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any("document" in name for name in moved)


@pytest.mark.parametrize("mode", ["exact", "mined"])
def test_the_loss_of_an_evaluation_set_needs_no_column_of_its_own(mode, queries, still_bert, tmp_path):
    """Its queries have no hard negatives, and a column `row` of a user's is none of ours."""
    others = queries.select(range(4)).add_column("row", ["first", "second", "third", "fourth"])
    args = arguments(tmp_path, label_mode=mode, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = XMCTrainer(make_bert_encoder(still_bert), args, queries, labels=LABELS, eval_dataset=others)
    trainer.train()
    losses_seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses_seen) == 2
    assert min(losses_seen) > 0
    assert trainer.evaluate({"a": others, "b": others})["eval_b_loss"] == losses_seen[-1]


def test_training_learns(queries, tmp_path):
    encoder = make_static_encoder()
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(
        XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS})), "train"
    )
    before = evaluator(encoder)["P@1"]
    XMCTrainer(encoder, arguments(tmp_path, num_train_epochs=20), queries, labels=LABELS).train()
    assert evaluator(encoder)["P@1"] > before


def test_the_log_line_says_what_a_step_does(queries, tmp_path, bert_folder):
    encoder = make_bert_encoder(bert_folder)
    encoder.append(Normalize())
    trainer = XMCTrainer(encoder, arguments(tmp_path, label_chunk_size=4, label_mode="exact"), queries, labels=LABELS)
    sentence = trainer.describe_step()
    assert "5 queries a step (1 process(es)) is scored against 11 of 11 labels: about 9 negatives a query" in sentence
    assert "11 labels a step in 3 chunk(s), twice" in sentence
    assert "use a temperature of about 0.05" in sentence


def test_bad_input_says_what_was_got(queries, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="label_chunk_size must be at least 1, got 0"):
        arguments(tmp_path, label_chunk_size=0)
    with pytest.raises(ValueError, match=r"has no column label_ids; it has text"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries.select_columns("text"), labels=LABELS)
    bank = arguments(tmp_path, label_mode="bank")
    with pytest.raises(ValueError, match="BCELoss cannot weigh labels, which label_mode `bank` needs"):
        XMCTrainer(make_static_encoder(), bank, queries, labels=LABELS, loss=losses.BCELoss())
    broken = Dataset.from_dict({"text": ["a"], "label_ids": [[1.7]]})
    with pytest.raises(ValueError, match="train_dataset, row 0: label_ids are double; expected integers"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), broken, labels=LABELS)
    with pytest.raises(ValueError, match=r"prompts are the encoder's own: set model.prompts"):
        arguments(tmp_path, prompts={"text": "about "})
    with pytest.raises(ValueError, match=r"train_dataset must be a Dataset .* got NoneType"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), labels=LABELS)
    theirs = st_losses.DecoupledSoftmaxLoss(make_static_encoder())
    with pytest.raises(ValueError, match=r"st_losses.*is for the stock trainer"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS, loss=theirs)
    with pytest.raises(ValueError, match="train_dataset, row 3: label id 4, but there are only 4 labels"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS[:4])
    monkeypatch.setattr(XMCTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible to one process, which would run DataParallel"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS)
