"""A vector for each label, added to the embedding of its text: gradients, updates, evaluation and checkpoints."""

import logging
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import (
    LABELS,
    POSITIVES,
    best_of_texts,
    make_bert_encoder,
    make_static_encoder,
    relevance_of,
    several_texts,
)
from helpers.training import Recording, tiny_arguments
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import XMCEvaluator, XMCModel, XMCTrainer, losses, mine_hard_negatives
from hf_xmc.data.labels import LabelTexts
from hf_xmc.losses import functional
from hf_xmc.padding import pad
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.batching import TokenizedLabels
from hf_xmc.training.label_bank import LabelBank
from hf_xmc.training.label_vectors import LabelVectors, evaluated_with, vectors_for
from hf_xmc.training.mined_negatives import MinedNegatives
from hf_xmc.training.mining import HardNegativeMiner
from hf_xmc.training.negatives import BatchQueries
from hf_xmc.training.restart import FirstState
from hf_xmc.training.sampled_labels import SampledLabels

MODES = {  # that score all 11 labels, each with weight 1
    "exact": lambda table, vectors: AllLabels(table),
    "fresh": lambda table, vectors: AllLabels(table, 0.3, normalised=vectors.normalised),
    "bank": lambda table, vectors: LabelBank(table, losses.DecoupledSoftmaxLoss(), 1.0, 4, False, vectors),
    "sampled": lambda table, vectors: SampledLabels(table, 1.0, vectors.normalised),
    "mined": lambda table, vectors: MinedNegatives(table, 3, num_hard=11, own_labels_only=True),
}
SOME = torch.tensor([[3, 5], [10, -100], [0, 2]])


def table_of(encoder, several=False, **chunks):
    """Return the tokenized labels, their texts, and the label of each text."""
    data, label_of = several_texts()
    if not several:
        return TokenizedLabels(encoder, LABELS, **chunks), LABELS, list(range(11))
    order = np.argsort(label_of, kind="stable")
    texts, counts = [data["text"][row] for row in order], np.bincount(label_of)
    return TokenizedLabels(encoder, texts, text_counts=counts, **chunks), texts, sorted(label_of)


def vectors_of(table, rate=0.25):
    vectors = LabelVectors(table, rate)
    with torch.no_grad():
        vectors.weight.normal_(generator=torch.Generator().manual_seed(1))
    return vectors


@pytest.fixture
def encoders(bert_folder):
    def make(kind, normalised=False):
        encoder = make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder)
        if normalised:
            encoder.append(Normalize())
        return encoder.double().train()  # a transformer with dropout

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["static", "transformer"])
@pytest.mark.parametrize("form", ["", "several", "normalised", "chunks"])
def test_gradient_is_that_of_the_formula_in_every_label_mode(mode, kind, form, encoders):
    """In float64, with dropout: of the vectors, of the queries, and of the encoder if no label is sampled."""
    encoder = encoders(kind, form == "normalised")
    table, _, _ = table_of(encoder, form == "several", chunk_size=4 if form == "chunks" else None)
    vectors = vectors_of(table)
    negatives = MODES[mode](table, vectors)
    if mode == "mined":
        negatives.shortlist = torch.arange(11, dtype=torch.int32).expand(3, 11)
    queries = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    selected = negatives.select(encoder, BatchQueries(queries.detach(), SOME, None, torch.arange(3)))
    assert sorted(selected.label_ids.tolist()) == list(range(11))
    loss = losses.DecoupledSoftmaxLoss(temperature=1.0)
    torch.manual_seed(3)
    value = selected.loss(loss, queries, vectors.add(negatives.embed(encoder, selected), selected), None)
    value.backward()
    got = [value.detach(), queries.grad, vectors.weight.grad.to_dense()]
    trained = {name: p.grad.to_dense() for name, p in encoder.named_parameters() if p.grad is not None}

    encoder.zero_grad()
    own, others = vectors.weight.detach().clone().requires_grad_(), queries.detach().requires_grad_()
    torch.manual_seed(3)
    rows, place = table.short_first(selected.label_ids)
    labels = torch.cat([encoder({**part}, task="document")["sentence_embedding"] for part in _features(table, rows)])
    labels = labels if place is None else labels[place]
    of_texts = np.repeat(selected.label_ids, 1 if table.text_counts is None else table.text_counts[selected.label_ids])
    labels = labels + own[torch.from_numpy(of_texts)]
    if form == "normalised":
        labels = labels / labels.norm(dim=1, keepdim=True)
    functional.decoupled_softmax_loss(best_of_texts(others @ labels.T, of_texts), SOME).backward()
    expected = functional.decoupled_softmax_loss(best_of_texts(others @ labels.T, of_texts), SOME).detach()
    assert own.grad.norm() > 0.01
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(got[0], expected, **tolerance)
    torch.testing.assert_close(got[2], own.grad, **tolerance)
    if mode != "bank":  # whose gradient at the queries has a control variate: zero, up to remembered bfloat16
        torch.testing.assert_close(got[1], others.grad, **tolerance)
    if mode != "fresh":
        expected = {name: p.grad.to_dense() for name, p in encoder.named_parameters() if p.grad is not None}
        assert max(gradient.norm() for gradient in expected.values()) > 0.01
        torch.testing.assert_close(trained, expected, **tolerance)


def _features(table, rows):
    for _, features in table.chunks(rows):
        yield {name: value for name, value in features.items() if name != "role"}


def test_remembered_embeddings_of_the_bank_have_the_vectors_too(encoders):
    encoder = encoders("static")
    table, _, _ = table_of(encoder)
    vectors = vectors_of(table)
    bank = LabelBank(table, losses.DecoupledSoftmaxLoss(), 0.2, 4, False, vectors)
    queries = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 8
    torch.manual_seed(0)
    selected = bank.select(encoder, BatchQueries(queries, SOME, None, torch.arange(3)))
    assert len(selected.label_ids) < 11
    seen = queries.clone().requires_grad_()
    with torch.no_grad():
        texts = vectors.add(bank.embed(encoder, selected), selected)
    selected.loss(losses.DecoupledSoftmaxLoss(), seen, texts, None).backward()
    exact = queries.clone().requires_grad_()
    labels = encoder(encoder.preprocess(LABELS))["sentence_embedding"].detach() + vectors.weight.detach()
    functional.decoupled_softmax_loss(exact @ labels.T, SOME).backward()
    without_variate = seen.grad - selected.query_control_variate
    assert (without_variate - exact.grad).norm() > 0.05 * exact.grad.norm(), "the sample missed nothing"
    assert (seen.grad - exact.grad).norm() < 0.02 * exact.grad.norm()  # the bank is in bfloat16


def trainer_of(folder, queries, encoder=None, trainer=XMCTrainer, **settings):
    rest = {name: settings.pop(name) for name in ("evaluator", "eval_dataset", "loss", "labels") if name in settings}
    args = tiny_arguments(folder, **{"label_vectors": 0.25, "label_mode": "exact", **settings})
    return trainer(encoder or make_static_encoder(), args, queries, **{"labels": LABELS, **rest})


def test_first_update_follows_row_adam_at_a_fraction_of_the_learning_rate(queries, tmp_path):
    constant = {"max_steps": 1, "learning_rate": 0.2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_of(tmp_path, queries, trainer=Recording, **constant)
    before = make_static_encoder().double()
    trainer.train()
    ((features,), positives) = trainer.batches[0]
    features.pop("role")
    labels = before(before.preprocess(LABELS))["sentence_embedding"].detach().requires_grad_()
    scores = before(features)["sentence_embedding"] @ labels.T
    functional.decoupled_softmax_loss(scores, positives).backward()
    expected = -0.25 * 0.2 * labels.grad / labels.grad.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(trainer.label_vectors(), expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_accumulated_gradient_is_clipped_together_with_that_of_the_encoder(sparse, queries, tmp_path):
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 1, "logging_steps": 1}
    found = {}
    for max_norm in (0.0, 0.01):
        trainer = trainer_of(tmp_path, queries, sparse_updates=sparse, max_grad_norm=max_norm, **settings)
        seen = found[max_norm] = {}
        step = trainer.vectors.step

        def record(rate, trainer=trainer, seen=seen, step=step):
            everything = [trainer.vectors.weight, *trainer.model.parameters()]
            seen["gradients"] = [p.grad.to_dense().clone() for p in everything]
            step(rate)

        trainer.vectors.step = record
        trainer.train()
        seen["logged"] = next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
    whole, clipped = found[0.0]["gradients"], found[0.01]["gradients"]
    norm = torch.cat([g.flatten() for g in whole]).norm()
    assert all(g.norm() > 0.01 for g in whole)
    assert found[0.0]["logged"] == pytest.approx(float(norm), rel=1e-4)
    assert found[0.01]["logged"] == pytest.approx(float(norm), rel=1e-4)
    torch.testing.assert_close(clipped, [g * 0.01 / norm for g in whole], rtol=1e-3, atol=1e-7)


def test_sampled_step_reads_and_writes_the_vectors_of_its_labels_alone():
    encoder = make_static_encoder()
    table, _, _ = table_of(encoder)
    vectors, negatives = vectors_of(table), SampledLabels(table, 0.2, False)
    before = vectors.weight.detach().clone()
    queries = encoder.encode(LABELS[:3], convert_to_tensor=True).clone()
    torch.manual_seed(0)
    selected = negatives.select(encoder, BatchQueries(queries, SOME, None, None))
    assert 5 < len(selected.label_ids) < 11
    selected.loss(
        losses.DecoupledSoftmaxLoss(), queries, vectors.add(negatives.embed(encoder, selected), selected), None
    ).backward()
    assert vectors.weight.grad.is_sparse
    assert vectors.weight.grad.coalesce().indices()[0].tolist() == selected.label_ids.tolist()
    vectors.step(0.1)
    assert vectors.weight.grad is None
    changed = (vectors.weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == selected.label_ids.tolist()


def test_vectors_are_no_modules_of_the_encoder_and_start_at_zero(queries, tmp_path):
    trainer = trainer_of(tmp_path, queries)
    assert not trainer.label_vectors().any()
    assert trainer.label_vectors().shape == (11, 16)
    assert [name for name, _ in trainer.loss.named_parameters()] == ["model.0.embedding.weight"]
    assert "A vector for each label learns at 0.25 times the learning rate." in trainer.describe_step()
    assert trainer_of(tmp_path, queries, label_vectors=0.0).label_vectors() is None


def test_weight_decay_leaves_vectors_alone(queries, tmp_path):
    ends = []
    for decay in (0.0, 0.5):
        trainer = trainer_of(tmp_path, queries, max_steps=1, weight_decay=decay)
        trainer.train()
        ends.append((trainer.label_vectors(), trainer.model[0].embedding.weight.detach().clone()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("form", ["plain", "normalised", "several"])
def test_evaluation_adds_the_vectors(form, queries, tmp_path):
    encoder = make_static_encoder()
    if form == "normalised":
        encoder.append(Normalize())
    labels = several_texts()[0] if form == "several" else LABELS
    evaluator = XMCEvaluator(list(queries["text"]), relevance_of(queries["label_ids"]), labels, write_csv=False)
    settings = {"evaluator": [evaluator], "eval_dataset": queries, "labels": labels}
    trainer = trainer_of(tmp_path, queries, encoder, **settings)
    with torch.no_grad():
        trainer.vectors.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(4))
    metrics = trainer.evaluate()
    assert evaluator.label_vectors is None
    model = XMCModel(encoder, labels, label_vectors=trainer.label_vectors())
    asked = list(queries["text"])
    expected = evaluator.score(model.search(asked, evaluator.max_k))
    assert metrics["eval_nDCG@5"] == pytest.approx(expected["nDCG@5"])
    assert expected["nDCG@5"] != pytest.approx(evaluator(encoder)["nDCG@5"]), "the vectors changed nothing"
    scores = model.embed(asked) @ model.index.embeddings.T
    scores = best_of_texts(scores, model.label_texts.label_of)
    temperature = 0.05 if form == "normalised" else 1.0
    loss = functional.decoupled_softmax_loss(scores.double() / temperature, pad(queries["label_ids"]))
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_an_evaluator_of_other_labels_gets_vectors_by_uid_and_text():
    ours, _ = LabelTexts.of(Dataset.from_dict({"uid": ["a", "b", "c"], "text": ["boat", "car", "dog"]}))
    theirs, _ = LabelTexts.of(Dataset.from_dict({"uid": ["c", "x", "a"], "text": ["dog", "car", "ship"]}))
    vectors = torch.arange(1.0, 7).view(3, 2)
    assert vectors_for(theirs, ours, vectors).tolist() == [[5, 6], [0, 0], [0, 0]]
    assert vectors_for(ours, ours, vectors) is vectors
    one = XMCEvaluator(["x"], relevance_of([[0]]), LABELS)
    with pytest.raises(RuntimeError), evaluated_with(SequentialEvaluator([one]), LabelTexts.of(LABELS)[0], vectors):
        raise RuntimeError
    assert one.label_vectors is None


def test_mining_adds_the_vectors(queries, tmp_path):
    settings = {"label_mode": "mined", "num_hard_negatives": 1, "max_steps": 3}
    trainer = trainer_of(tmp_path, queries, **settings)
    with torch.no_grad():
        trainer.vectors.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(4))
    vectors = trainer.label_vectors()
    miner = HardNegativeMiner(trainer, depth=4)
    trainer.state.epoch = 0
    miner.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    found = XMCModel(trainer.model, LABELS, label_vectors=vectors).search(list(queries["text"]), 11)
    own = [
        [label for label in row if label not in set(ids)][:4]
        for row, ids in zip(found.label_ids, POSITIVES, strict=True)
    ]
    assert trainer.negatives.shortlist.tolist() == own
    assert mine_hard_negatives(trainer.model, queries, LABELS, 4).tolist() != own


def checkpointed(folder, queries, max_steps, **settings):
    steps = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    sampled = {"label_mode": "sampled", "label_sample_fraction": 0.3, "sparse_updates": True}
    return trainer_of(folder, queries, **{**sampled, **steps, **settings})


def test_resumed_run_ends_the_same_bit_for_bit(queries, tmp_path):
    whole = checkpointed(tmp_path / "whole", queries, 6)
    whole.train()
    again = checkpointed(tmp_path / "again", queries, 6)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.label_vectors().any()
    for name, value in whole.vectors.state_dict().items():
        assert torch.equal(again.vectors.state_dict()[name], value), name
    assert torch.equal(again.model[0].embedding.weight, whole.model[0].embedding.weight)


def test_a_checkpoint_with_other_vectors_is_refused(queries, tmp_path):
    checkpointed(tmp_path / "with", queries, 2).train()
    checkpointed(tmp_path / "without", queries, 2, label_vectors=0.0).train()
    for saved, rate, words in [("without", 0.25, "has no label vectors"), ("with", 0.0, "has label vectors")]:
        trainer = checkpointed(tmp_path / "new", queries, 4, label_vectors=rate)
        with pytest.raises(ValueError, match=f"{words} of this process in .*label_vectors is {rate:g}"):
            trainer.train(resume_from_checkpoint=str(tmp_path / saved / "checkpoint-2"))
    small = LabelVectors(TokenizedLabels(make_static_encoder(), LABELS[:3]), 0.25)
    with pytest.raises(ValueError, match=re.escape("vectors of shape (11, 16) for this process, which needs (3, 16)")):
        small.load_state_dict(checkpointed(tmp_path / "new", queries, 2).vectors.state_dict())


def test_the_best_checkpoint_brings_its_vectors_back(queries, tmp_path):
    evaluator = XMCEvaluator(list(queries["text"]), relevance_of(queries["label_ids"]), LABELS, write_csv=False)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "P@5", "greater_is_better": False}
    steps = {"eval_strategy": "steps", "eval_steps": 2}  # the worst by P@5, which is an early one
    trainer = checkpointed(tmp_path, queries, 6, evaluator=evaluator, learning_rate=0.5, **best, **steps)
    kept = {}
    save = trainer.save_state

    def remember(folder):
        kept[trainer.state.global_step] = trainer.label_vectors()
        save(folder)

    trainer.save_state = remember
    trainer.train()
    number = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert torch.equal(trainer.label_vectors(), kept[number])
    assert len({tuple(value.flatten().tolist()) for value in kept.values()}) == 3


class NoNumber(losses.DecoupledSoftmaxLoss):
    """A loss that is not finite in the second step."""

    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs) * (torch.nan if self.calls == 2 else 1)


def test_a_skipped_update_leaves_the_vectors_alone(queries, tmp_path, caplog):
    trainer = trainer_of(tmp_path, queries, loss=NoNumber(), on_nonfinite="skip", max_steps=2)
    once = trainer_of(tmp_path, queries, max_steps=1, lr_scheduler_type="constant")
    trainer.args.lr_scheduler_type = once.args.lr_scheduler_type
    with caplog.at_level(logging.WARNING):
        trainer.train()
    once.train()
    assert "The update is skipped" in caplog.text
    assert once.label_vectors().any()
    assert torch.equal(trainer.label_vectors(), once.label_vectors())
    assert trainer.vectors.weight.grad is None


def test_another_attempt_starts_from_the_first_vectors(queries, tmp_path):
    trainer = trainer_of(tmp_path, queries, max_steps=2)
    trainer.train()
    first = FirstState.of(trainer)
    before = {name: value.clone() for name, value in trainer.vectors.state_dict().items()}
    trainer.train()
    assert not torch.equal(trainer.vectors.weight, before["vectors"])
    first.restore(trainer)
    for name, value in trainer.vectors.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_labels_of_another_process_are_refused():
    table, _, _ = table_of(make_static_encoder())
    vectors, selected = LabelVectors(table, 0.25), AllLabels(table).select(None, BatchQueries(None, SOME, None, None))
    vectors.shard = type(vectors.shard)(0, 5)
    with pytest.raises(ValueError, match="which on rank 0 are 0 to 4; `negatives` selected label 5"):
        vectors.add(torch.zeros(11, 16), selected)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "much"])
def test_a_fraction_that_is_no_number_or_negative_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="label_vectors must be a finite number of at least 0, got"):
        tiny_arguments(tmp_path, label_vectors=value)
