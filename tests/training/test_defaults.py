"""Arguments that are not given follow from the encoder and the number of queries; given ones stay."""

import pytest
from datasets import Dataset
from helpers.tiny import LABELS, make_static_encoder
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCEvaluator, XMCTrainer, XMCTrainingArguments
from hf_xmc.data.dataset import relevance_of
from hf_xmc.losses import BCELoss
from hf_xmc.training.all_labels import AllLabels
from hf_xmc.training.defaults import arguments_for

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
NAMES = ("learning_rate", "per_device_train_batch_size", "num_train_epochs")


def queries(number):
    texts = [f"{LABELS[row % len(LABELS)]} number {row}" for row in range(number)]
    return Dataset.from_dict({"text": texts, "label_ids": [[row % len(LABELS)] for row in range(number)]})


def values(args):
    return tuple(getattr(args, name) for name in NAMES)


@pytest.mark.parametrize(
    ("kind", "number", "expected"),
    [
        ("a static encoder", 100, (0.04, 32, 8)),
        ("a static encoder", 2000, (0.04, 128, 8)),
        ("a transformer, 21 steps", 100, (3e-4, 16, 3)),
        ("a transformer, 96 steps", 2000, (2.3e-4, 64, 3)),
    ],
)
def test_missing_arguments_follow_from_the_encoder_and_the_queries(
    kind, number, expected, bert_folder, tmp_path, caplog
):
    bert = SentenceTransformer(str(bert_folder), device="cpu")
    encoder = make_static_encoder() if kind == "a static encoder" else bert
    args = XMCTrainingArguments(str(tmp_path), **QUIET)
    with caplog.at_level("INFO"):
        trainer = XMCTrainer(encoder, args, queries(number), labels=LABELS)
    assert values(trainer.args) == expected
    assert values(args) == (None, None, None)  # another trainer may use them
    assert trainer.get_train_dataloader().batch_sampler.batch_size == expected[1]
    said = [record.getMessage() for record in caplog.records if "Chosen for this encoder" in record.getMessage()]
    assert len(said) == 1
    assert f"learning_rate {expected[0]} ({kind}), per_device_train_batch_size {expected[1]} (" in said[0]


def test_given_arguments_stay_even_if_they_are_the_defaults_of_transformers(tmp_path, caplog):
    given = {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "num_train_epochs": 3.0}
    args = XMCTrainingArguments(str(tmp_path), **QUIET, **given)
    with caplog.at_level("INFO"):
        trainer = XMCTrainer(make_static_encoder(), args, queries(2000), labels=LABELS)
    assert trainer.args is args
    assert values(args) == (5e-5, 8, 3.0)
    assert "Chosen for this encoder" not in caplog.text
    some = XMCTrainingArguments(str(tmp_path), **QUIET, max_steps=5, learning_rate=0.1)
    with caplog.at_level("INFO"):
        trainer = XMCTrainer(make_static_encoder(), some, queries(2000), labels=LABELS)
    assert values(trainer.args)[:2] == (0.1, 128)
    assert "unless you set them: per_device_train_batch_size 128 (16 batches an epoch)" in caplog.text


@pytest.mark.parametrize(
    ("number", "given", "rate"),
    [
        (100, {"num_train_epochs": 30.0}, 1.5e-4),  # 210 steps
        (100, {"per_device_train_batch_size": 1}, 1.3e-4),  # 300 steps
        (100, {"max_steps": 500}, 1e-4),
        (100, {"max_steps": 56}, 3e-4),
        (100, {"max_steps": 2000}, 5e-5),
        (100, {"max_steps": 9000}, 5e-5),
        (2000, {"gradient_accumulation_steps": 2}, 3e-4),  # 48 steps
    ],
)
def test_the_rate_of_a_transformer_falls_with_the_square_root_of_the_steps(number, given, rate, bert_folder, tmp_path):
    encoder = SentenceTransformer(str(bert_folder), device="cpu")
    args = XMCTrainingArguments(str(tmp_path), **QUIET, **given)
    assert arguments_for(encoder, args, number, given)["learning_rate"][0] == rate
    encoder = make_static_encoder()
    assert arguments_for(encoder, args, number, given)["learning_rate"][0] == 0.04


def test_a_model_of_model_init_gets_its_arguments(tmp_path):
    args = XMCTrainingArguments(str(tmp_path), **QUIET, max_steps=1)

    def make():
        return make_static_encoder()

    trainer = XMCTrainer(None, args, queries(100), labels=LABELS, model_init=make)
    assert values(trainer.args)[:2] == (0.04, 32)
    trainer.train()
    assert trainer.state.train_batch_size == 32


def test_a_trainer_with_no_further_settings_learns(tmp_path):
    encoder, train = make_static_encoder(), queries(600)
    evaluator = XMCEvaluator(train["text"][:200], relevance_of(train.select(range(200)), len(LABELS)), LABELS)
    before = evaluator(encoder)["P@1"]
    XMCTrainer(encoder, XMCTrainingArguments(str(tmp_path), **QUIET), train, labels=LABELS).train()
    after = evaluator(encoder)["P@1"]
    assert after > max(0.9, before)


def test_a_static_encoder_with_many_labels_is_told_what_is_faster(tmp_path, caplog):
    labels = [f"{LABELS[number % len(LABELS)]} {number}" for number in range(1000)]
    encoder, said = make_static_encoder(), "set label_mode='sampled' and sparse_updates=True"

    def told(labels=labels, **given):
        caplog.clear()
        loss = given.pop("loss", None)
        args = XMCTrainingArguments(str(tmp_path), **QUIET, **given)
        with caplog.at_level("INFO"):
            trainer = XMCTrainer(encoder, args, queries(20), labels=labels, loss=loss)
        assert given.get("label_mode") == "sampled" or isinstance(trainer.negatives, AllLabels)
        return said in caplog.text

    assert told()
    assert not told(labels[:999])
    assert not told(label_mode="exact")
    assert not told(label_mode="sampled", sparse_updates=True)
    assert not told(weight_decay=0.1)  # which sparse updates would ignore
    assert not told(loss=BCELoss())
