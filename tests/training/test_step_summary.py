"""A training shows one line at its start, and no warnings in a normal run."""

import logging
import warnings

import pytest
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from transformers import TrainerCallback

from hf_xmc import XMCTrainer, XMCTrainingArguments
from hf_xmc.training.step_summary import StepSummary


def run(queries, bert_folder, folder):
    args = XMCTrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=5,
        report_to="none",
        save_strategy="epoch",
        eval_strategy="epoch",
        use_cpu=True,
        label_mode="fresh",
    )
    trainer = XMCTrainer(make_bert_encoder(bert_folder), args, queries, labels=LABELS, eval_dataset=queries)
    trainer.train()
    return trainer


def test_training_shows_one_line_and_no_warning(queries, bert_folder, tmp_path, caplog, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = run(queries, bert_folder, tmp_path)
    shown = capsys.readouterr().err
    assert shown.count("Each step scores 5 queries on 1 process against 11 of 11 labels") == 1
    assert f"Word vectors learn at {trainer.word_factor:.3g} times the learning rate" in shown
    assert trainer.word_factor > 1
    assert trainer.model.model_card_data.widget  # example texts, which sentence-transformers draws with a progress bar
    assert "widget" not in shown
    assert not [message for message in map(str, caught) if "pin_memory" in message]
    assert not [record for record in caplog.records if record.name.startswith("hf_xmc")]


def test_step_summary_is_logged_if_the_info_level_is_on(queries, bert_folder, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="hf_xmc")
    run(queries, bert_folder, tmp_path)
    assert caplog.text.count("Each step scores 5 queries") == 1
    assert "Each step scores" not in capsys.readouterr().err


def test_step_summary_can_be_removed(queries, bert_folder, tmp_path):
    trainer = run(queries, bert_folder, tmp_path)
    trainer.remove_callback(StepSummary)
    assert not any(isinstance(callback, StepSummary) for callback in trainer.callback_handler.callbacks)
    assert isinstance(trainer.callback_handler.callbacks[0], TrainerCallback)


@pytest.mark.parametrize(("start", "sentence"), [(0.0, " Each"), (0.4, " After 40% of the steps, each")])
def test_step_summary_names_the_queries_that_vote(start, sentence, queries, tmp_path):
    votes = {"vote_loss": 0.5, "vote_start": start, "vote_queries": 7}
    args = XMCTrainingArguments(str(tmp_path), label_vectors=0.25, use_cpu=True, **votes)
    said = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS).describe_step()
    assert said.endswith(f"{sentence} process also embeds up to 7 training queries per step, which vote.")
    assert "A vector for each label learns at 0.25 times the learning rate." in said


@pytest.mark.parametrize(("mode", "bound"), [("exact", ""), ("sampled", "at most "), ("bank", "at most ")])
def test_step_summary_calls_bounds_bounds(mode, bound, queries, tmp_path):
    args = XMCTrainingArguments(str(tmp_path), label_mode=mode, per_device_train_batch_size=13, use_cpu=True)
    sentence = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS).describe_step()
    assert f"against {bound}11 of 11 labels" in sentence
    assert f"embeds {bound}11 label texts" in sentence
