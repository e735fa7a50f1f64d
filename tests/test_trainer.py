"""A step of the trainer is the gradient of the formula; a run that stops goes on as if it had not."""

import copy

import pytest
import torch
from conftest import LABELS, make_bert, make_bert_encoder, make_static_encoder
from datasets import Dataset
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import (
    ExtremeMultilabelClassificationEvaluator,
    XMCData,
    XMCTrainer,
    XMCTrainingArguments,
    functional,
    losses,
)

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
def test_a_step_is_the_gradient_of_the_formula(
    name, kind, label_chunk_size, accumulation, queries, still_bert, tmp_path
):
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(still_bert)
    exact = copy.deepcopy(encoder).double()
    loss, formula = LOSSES[name]
    rows = queries.add_column("label_scores", [[1.0 + i % 2 for i in ids] for ids in queries["label_ids"]])
    args = arguments(
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        label_chunk_size=label_chunk_size,
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


def run(encoder, folder, queries, resume=None, **settings):
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=4, **settings)
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, loss=losses.BCELoss())
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_where_the_other_did(accumulation, queries, bert_folder, tmp_path):
    """Dropout on, in the middle of an epoch, and with a bias that no file of the encoder holds."""
    settings = {"gradient_accumulation_steps": accumulation, "label_chunk_size": 4}
    whole = run(make_bert_encoder(bert_folder), tmp_path / "whole", queries, **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = run(make_bert_encoder(bert_folder), tmp_path / "resumed", queries, resume=str(checkpoint), **settings)
    assert whole["bias"] != -10
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


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
    trainer = XMCTrainer(encoder, arguments(tmp_path, label_chunk_size=4), queries, labels=LABELS)
    sentence = trainer.describe_step()
    assert "5 queries a step (1 process(es)) is scored against all 11 labels: about 9 negatives a query" in sentence
    assert "11 labels a step in 3 chunk(s), twice" in sentence
    assert "use a temperature of about 0.05" in sentence


def test_bad_input_says_what_was_got(queries, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="label_chunk_size must be at least 1, got 0"):
        arguments(tmp_path, label_chunk_size=0)
    with pytest.raises(ValueError, match=r"has no column label_ids; it has text"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries.select_columns("text"), labels=LABELS)
    few = XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS[:4])
    with pytest.raises(ValueError, match=r"positives contains label id \d+, but there are only 4 labels"):
        few.train()
    monkeypatch.setattr(XMCTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible to one process, which would run DataParallel"):
        XMCTrainer(make_static_encoder(), arguments(tmp_path), queries, labels=LABELS)
