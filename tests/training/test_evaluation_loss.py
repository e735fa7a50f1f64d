"""The evaluation loss counts all labels and positives, is deterministic, and does not affect the training."""

import logging
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.losses import TRAINED
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder, relevance_of
from helpers.training import tiny_arguments

from hf_xmc import HardNegativeMiner, XMCEvaluator, XMCTrainer, losses
from hf_xmc.losses import functional

MODES = {
    "exact": {"num_positives": 1},
    "fresh": {"label_sample_fraction": 0.3},
    "bank": {"label_sample_fraction": 0.3, "label_bank_max_age": 5},
    "mined": {"num_hard_negatives": 2, "num_random_negatives": 2, "num_positives": 1},
}


def graded(queries):
    return queries.add_column("label_scores", [[float(1 + i % 3) for i in ids] for ids in queries["label_ids"]])


def trainer_of(folder, encoder, queries, eval_dataset=None, mode="exact", loss=None, evaluator=None, **settings):
    settings = {"per_device_eval_batch_size": 5, "max_steps": 4, **MODES.get(mode, {}), **settings}
    args = tiny_arguments(folder, label_mode=mode, label_chunk_size=4, **settings)
    evaluation = {"eval_dataset": queries if eval_dataset is None else eval_dataset, "evaluator": evaluator}
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, loss=loss or losses.SoftmaxLoss(), **evaluation)
    if mode == "mined":
        trainer.add_callback(HardNegativeMiner(trainer))
    return trainer


def by_hand(encoder, queries, formula=functional.softmax_loss):
    """The mean over the queries with a positive, each against all labels, one at a time."""
    labels = encoder.encode_document(LABELS, convert_to_tensor=True).double()
    values = []
    for row in queries:
        if row["label_ids"]:
            scores = encoder.encode_query([row["text"]], convert_to_tensor=True).double() @ labels.T
            weights = torch.tensor([row["label_scores"]]).double() if "label_scores" in row else None
            values.append(float(formula(scores, torch.tensor([row["label_ids"]]), weights)))
    return sum(values) / len(values)


def state_of(trainer):
    """All that an evaluation may not change."""
    negatives = trainer.negatives
    kept = {name: getattr(negatives, name, None) for name in ("next", "shortlist", "trained", "reached", "embeddings")}
    kept |= {f"weight {i}": p for i, p in enumerate(trainer.loss.parameters())}
    kept |= {"python": random.getstate(), "numpy": np.random.get_state()[1].tolist(), "torch": torch.get_rng_state()}  # noqa: NPY002
    kept |= {"skipped": trainer.watch.skipped, "batches": list(trainer.watch._batches)}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kept.items()}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_loss_is_computed_against_all_labels_and_changes_nothing(mode, size, queries, bert_folder, tmp_path):
    """Graded positives, a query without one, and dropout that is off."""
    rows = graded(queries)
    trainer = trainer_of(
        tmp_path, make_bert_encoder(bert_folder), rows, mode=mode, per_device_eval_batch_size=size, max_steps=1
    )
    trainer.train()
    before = state_of(trainer)
    seen = [trainer.evaluate()["eval_loss"] for _ in range(3)]
    for name, value in state_of(trainer).items():
        same = torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
        assert same, name
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] == pytest.approx(by_hand(trainer.model, rows), rel=1e-5)
    assert trainer.predict(queries).metrics["test_loss"] == pytest.approx(by_hand(trainer.model, queries), rel=1e-5)


class Drawing(XMCEvaluator):
    """An evaluator that draws random numbers."""

    def __call__(self, *args, **kwargs):
        drawn = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        assert len(drawn) == 3
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_leaves_the_training_bit_for_bit_the_same(mode, queries, bert_folder, tmp_path):
    """Bit for bit, with dropout on, in the middle of an epoch."""
    ends = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        evaluator = Drawing(queries["text"], relevance_of(queries["label_ids"]), LABELS)
        encoder = make_bert_encoder(bert_folder)
        trainer = trainer_of(tmp_path, encoder, queries, mode=mode, evaluator=evaluator, **settings)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.loss.parameters()]))
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 5
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation_loss_is_the_formula_for_every_loss(name, queries, tmp_path):
    loss, formula = TRAINED[name]
    rows = graded(queries)
    trainer = trainer_of(
        tmp_path, make_static_encoder(), rows, mode="bank" if loss.supports_label_weights else "mined", loss=loss
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand(trainer.model, rows, formula), rel=1e-5)


def test_named_evaluation_sets_have_one_loss_each(queries, tmp_path):
    """Also with `dataloader_drop_last`, which drops queries of the training only."""
    parts = {"few": queries.select(range(3)), "one": queries.select([7])}
    trainer = trainer_of(
        tmp_path, make_static_encoder(), queries, DatasetDict(parts), mode="mined", dataloader_drop_last=True
    )
    metrics = trainer.evaluate()
    for name, part in parts.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(by_hand(trainer.model, part), rel=1e-5)


def test_evaluation_set_without_positives_has_no_loss(queries, tmp_path, caplog):
    empty = Dataset.from_dict({"text": ["a boat", "a car"], "label_ids": [[], []]}).cast(queries.features)
    trainer = trainer_of(tmp_path, make_static_encoder(), queries, empty)
    with caplog.at_level(logging.WARNING):
        assert math.isnan(trainer.evaluate()["eval_loss"])
    assert "no query of the evaluation data set has a label" in caplog.text


def test_non_finite_evaluation_loss_is_reported(queries, tmp_path):
    """The stock trainer leaves such batches out of the mean."""
    encoder = make_static_encoder()
    trainer = trainer_of(tmp_path, encoder, queries, per_device_eval_batch_size=1)
    tokens = encoder.preprocess([queries["text"][3]])["input_ids"]
    encoder[0].embedding.weight.data[tokens[-1]] = float("nan")
    assert not math.isfinite(trainer.evaluate()["eval_loss"])


def test_labels_are_embedded_once_per_evaluation(queries, tmp_path):
    trainer = trainer_of(tmp_path, make_static_encoder(), queries, per_device_eval_batch_size=1)
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda features, **kwargs: seen.append(len(features["offsets"])) or forward(features)
    trainer.evaluate()
    assert seen == [1, 4, 4, 3, *[1] * 12]  # the first query, the labels in chunks, the other queries
