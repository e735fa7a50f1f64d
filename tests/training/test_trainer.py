"""A step of the trainer has the gradient of the formula, and a resumed run equals an uninterrupted one."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers.losses import TRAINED as LOSSES
from helpers.tiny import (
    LABELS,
    make_bert_encoder,
    make_router,
    make_router_with_frozen_labels,
    make_static_encoder,
)
from helpers.training import ONE_STEP, Recording, tiny_arguments
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import (
    HardNegativeMiner,
    XMCData,
    XMCEvaluator,
    XMCTrainer,
    XMCTrainingArguments,
    losses,
)

# Two losses, one of them with learned parameters, on all cells, and the others on one cell each. The formulas
# themselves are tested in tests/losses.
CELLS = [("static", None, 1), ("static", 4, 2), ("bert", 100, 1), ("bert", 4, 1), ("bert", 3, 2)]
GRID = [(name, *cell, mode) for name in ("decoupled", "bce") for cell in CELLS for mode in ("exact", "fresh")]
GRID += [("softmax", "bert", 4, 1, "fresh"), ("soft top-k", "bert", 3, 2, "exact")]


@pytest.mark.parametrize(("name", "kind", "label_chunk_size", "accumulation", "mode"), GRID)
def test_step_has_the_gradient_of_the_formula(
    name, kind, label_chunk_size, accumulation, mode, queries, still_bert, tmp_path
):
    """Of all labels, and of a sample that holds them all."""
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)
    exact = copy.deepcopy(encoder).double()
    loss, formula = LOSSES[name]
    rows = queries.add_column("label_scores", [[1.0 + i % 2 for i in ids] for ids in queries["label_ids"]])
    args = tiny_arguments(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        label_chunk_size=label_chunk_size,
        label_mode=mode,
        label_sample_fraction=1.0,
        **ONE_STEP,
    )
    trainer = Recording(encoder, args, rows, labels=LABELS, loss=copy.deepcopy(loss))
    trainer.train()

    assert len(trainer.inputs) == accumulation
    for batch in trainer.inputs:
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
    args = tiny_arguments(folder, max_steps=6, save_strategy="steps", save_steps=1, **settings)
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, loss=loss())
    if args.label_mode == "mined":
        trainer.add_callback(HardNegativeMiner(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}


MODES = {
    "exact": {},
    "fresh": {"label_sample_fraction": 0.3},
    "bank": {"label_sample_fraction": 0.3, "label_bank_max_age": 5, "loss": losses.DecoupledSoftmaxLoss},
    "sampled": {"label_sample_fraction": 0.3, "loss": losses.DecoupledSoftmaxLoss},
    "mined": {"num_hard_negatives": 2, "num_random_negatives": 2, "num_positives": 1, "loss": losses.SoftmaxLoss},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("accumulation", "step"), [(1, 3), (1, 4), (2, 4)])  # 3 batches an epoch: at its end, within
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(mode, accumulation, step, queries, bert_folder, tmp_path):
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


def test_checkpoint_of_another_label_mode_is_refused(queries, bert_folder, tmp_path):
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
def test_scaled_loss_has_the_scaled_gradient(mode, queries, still_bert, tmp_path):
    """As a GradScaler does it, and where a gradient overflows it stays no number: the step is skipped."""
    args = tiny_arguments(tmp_path, label_mode=mode, label_sample_fraction=1.0, label_chunk_size=4)
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
def test_bf16_autocast_applies_to_both_passes_over_the_labels(mode, queries, still_bert, tmp_path):
    """No further from float32 than the whole step in one graph is, in the same precision."""

    def gradient(mode, **settings):
        args = tiny_arguments(tmp_path, label_mode=mode, label_sample_fraction=1.0, **settings)
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


def test_best_checkpoint_is_kept(queries, tmp_path):
    data = XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS}), validation=queries)
    args = tiny_arguments(
        tmp_path,
        num_train_epochs=4,
        learning_rate=3.0,  # too high on purpose: later epochs are worse than some earlier one
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="P@5",
    )
    evaluator = XMCEvaluator.from_data(data, "validation")
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, evaluator=evaluator)
    trainer.train()
    seen = [entry["eval_P@5"] for entry in trainer.state.log_history if "eval_P@5" in entry]
    assert len(seen) == 4
    assert evaluator(trainer.model)["P@5"] == max(seen) == trainer.state.best_metric


@pytest.mark.parametrize("mode", ["exact", "fresh"])
def test_label_tower_is_trained_with_the_query_tower(mode, queries, still_bert, tmp_path):
    encoder = make_router(still_bert)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = tiny_arguments(tmp_path, label_mode=mode, max_steps=2, label_chunk_size=4, router_mapping={"text": "query"})
    XMCTrainer(encoder, args, queries, labels=LABELS).train()
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert {tower for name in moved for tower in ("query", "document") if tower in name} == {"query", "document"}


def test_bank_gives_the_query_tower_the_gradient_of_all_labels(queries, still_bert, tmp_path):
    gradients = {}
    for mode in ("exact", "bank"):
        encoder = make_router(still_bert)
        args = tiny_arguments(tmp_path, label_mode=mode, label_sample_fraction=0.2, router_mapping={"text": "query"})
        trainer = XMCTrainer(encoder, args, queries.select([0, 2, 4, 7, 9]), labels=LABELS)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(encoder.eval(), inputs).backward()
        tower = [p for name, p in encoder.named_parameters() if "query" in name and p.grad is not None]
        gradients[mode] = torch.cat([p.grad.flatten() for p in tower])
    difference = (gradients["bank"] - gradients["exact"]).norm()
    assert difference < 0.01 * gradients["exact"].norm()  # the bank is in bfloat16


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_batch_of_queries_without_labels_is_skipped(mode, queries, bert_folder, tmp_path):
    queries = Dataset.from_dict({"text": ["a boat", "a car"], "label_ids": [[], []]}).cast(queries.features)
    encoder = make_bert_encoder(bert_folder)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = tiny_arguments(tmp_path, label_mode=mode, max_steps=2, per_device_train_batch_size=1)
    XMCTrainer(encoder, args, queries, labels=LABELS).train()
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_label_tower_may_be_frozen(mode, queries, still_bert, tmp_path):
    encoder = make_router_with_frozen_labels(still_bert)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = tiny_arguments(tmp_path, label_mode=mode, max_steps=2, router_mapping={"text": "query"})
    XMCTrainer(encoder, args, queries, labels=LABELS).train()
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any("document" in name for name in moved)


@pytest.mark.parametrize("mode", ["exact", "mined"])
def test_evaluation_set_needs_no_hard_negatives_and_may_have_a_row_column(mode, queries, still_bert, tmp_path):
    """Its queries have no hard negatives, and a column `row` of a user's is none of ours."""
    others = queries.select(range(4)).add_column("row", ["first", "second", "third", "fourth"])
    args = tiny_arguments(tmp_path, label_mode=mode, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = XMCTrainer(make_bert_encoder(still_bert), args, queries, labels=LABELS, eval_dataset=others)
    trainer.train()
    losses_seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses_seen) == 2
    assert min(losses_seen) > 0
    assert trainer.evaluate({"a": others, "b": others})["eval_b_loss"] == losses_seen[-1]


def test_training_raises_the_precision(queries, tmp_path):
    encoder = make_static_encoder()
    evaluator = XMCEvaluator.from_data(XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS})), "train")
    before = evaluator(encoder)["P@1"]
    XMCTrainer(encoder, tiny_arguments(tmp_path, num_train_epochs=20), queries, labels=LABELS).train()
    assert evaluator(encoder)["P@1"] > before


def test_step_description_counts_queries_labels_and_processes(queries, tmp_path, bert_folder):
    encoder = make_bert_encoder(bert_folder)
    encoder.append(Normalize())
    args = tiny_arguments(tmp_path, label_chunk_size=4, label_mode="exact")
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, loss=losses.DecoupledSoftmaxLoss(1.0))
    sentence = trainer.describe_step()
    assert "scores 5 queries on 1 process against 11 of 11 labels, about 9 negatives per query" in sentence
    assert "embeds 11 label texts per step (11 of them twice)" in sentence
    assert "use a temperature of about 0.05" in sentence


@pytest.mark.parametrize(("normalised", "expected"), [(True, 0.05), (False, 1.0)])
@pytest.mark.parametrize("loss", [None, losses.SoftmaxLoss, losses.BCELoss(-3.0)])
def test_temperature_follows_the_encoder_and_appears_in_the_card(normalised, expected, loss, queries, tmp_path):
    encoder = make_static_encoder()
    if normalised:
        encoder.append(Normalize())
    trainer = XMCTrainer(encoder, tiny_arguments(tmp_path, max_steps=1), queries, labels=LABELS, loss=loss)
    assert trainer.loss.temperature == expected
    assert "use a temperature" not in trainer.describe_step()
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert f'"temperature": {expected}' in (tmp_path / "model" / "README.md").read_text()


def test_given_temperature_is_kept(queries, tmp_path):
    encoder = make_static_encoder()
    encoder.append(Normalize())
    loss = losses.SoftTopKLoss(temperature=0.5)
    XMCTrainer(encoder, tiny_arguments(tmp_path), queries, labels=LABELS, loss=loss)
    assert loss.temperature == 0.5


def test_invalid_input_is_named_in_the_error(queries, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="label_chunk_size must be at least 1, got 0"):
        tiny_arguments(tmp_path, label_chunk_size=0)
    with pytest.raises(ValueError, match=r"has no column label_ids, only text"):
        XMCTrainer(make_static_encoder(), tiny_arguments(tmp_path), queries.select_columns("text"), labels=LABELS)
    bank = tiny_arguments(tmp_path, label_mode="bank")
    with pytest.raises(ValueError, match="label_mode `bank` needs a loss that supports label weights, got BCELoss"):
        XMCTrainer(make_static_encoder(), bank, queries, labels=LABELS, loss=losses.BCELoss())
    broken = Dataset.from_dict({"text": ["a"], "label_ids": [[1.7]]})
    with pytest.raises(ValueError, match="train_dataset, row 0: label_ids must be integers, got double"):
        XMCTrainer(make_static_encoder(), tiny_arguments(tmp_path), broken, labels=LABELS)
    with pytest.raises(ValueError, match=r"prompts are the encoder's own: set model.prompts"):
        tiny_arguments(tmp_path, prompts={"text": "about "})
    with pytest.raises(ValueError, match=r"train_dataset must be a Dataset .* got NoneType"):
        XMCTrainer(make_static_encoder(), tiny_arguments(tmp_path), labels=LABELS)
    with pytest.raises(ValueError, match="train_dataset, row 3: label id 4, but there are only 4 labels"):
        XMCTrainer(make_static_encoder(), tiny_arguments(tmp_path), queries, labels=LABELS[:4])
    monkeypatch.setattr(XMCTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process must see one GPU, got 2, and would run DataParallel"):
        XMCTrainer(make_static_encoder(), tiny_arguments(tmp_path), queries, labels=LABELS)
