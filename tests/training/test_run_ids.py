"""In a folder with several runs, the latest run is resumed, whatever its steps, clocks and paths are."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import LABELS, make_static_encoder
from helpers.training import tiny_arguments
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback

from hf_xmc import XMCTrainer
from hf_xmc.training import checkpoints
from hf_xmc.training.checkpoints import Session, latest_complete, session_of, to_resume


class StopAfter(TrainerCallback):
    """Stops a run after the checkpoint of a step, or before the first one, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder, queries, rate, resume=None, stop=None, **settings):
    """A run of 6 steps; its trainer."""
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    args = tiny_arguments(folder, learning_rate=rate, **{**defaults, **settings})
    callbacks = [] if stop is None else [StopAfter(stop)]
    encoder = make_static_encoder(4)
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, evaluator=FirstIsBest(), callbacks=callbacks)
    if stop is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return trainer.model[0].embedding.weight.detach().clone()


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


def test_stopped_run_resumes_in_a_folder_with_an_older_run(queries, tmp_path, caplog):
    """The older run has more steps, and its files are newer: the clock went back."""
    old = train(tmp_path / "run", queries, 0.3)
    expected = train(tmp_path / "alone", queries, 0.01)
    stopped = train(tmp_path / "run", queries, 0.01, stop=3)
    assert steps(tmp_path / "run") == [2, 4, 6]
    os.utime(tmp_path / "run" / "checkpoint-2", (0, 0))
    with caplog.at_level(logging.WARNING):
        resumed = train(tmp_path / "run", queries, 0.01, resume=True)
    for step in (4, 6):
        assert f"Skipping {tmp_path / 'run' / f'checkpoint-{step}'}: it is of another run" in caplog.text
    assert torch.equal(weights(resumed), weights(expected))
    assert not torch.equal(weights(resumed), weights(old))
    assert resumed.session.run == stopped.session.run != old.session.run
    assert {session_of(path).run for path in (tmp_path / "run").glob("checkpoint-*")} == {resumed.session.run}


def test_run_stopped_before_its_first_checkpoint_cannot_be_resumed(queries, tmp_path):
    folder = tmp_path / "run"
    old = train(folder, queries, 0.3)
    train(folder, queries, 0.01, stop=1)
    assert latest_complete(folder) is None
    with pytest.raises(ValueError, match=r"the last run in .* has no complete checkpoint.*checkpoint-6 is of another"):
        train(folder, queries, 0.01, resume=True)
    again = train(folder, queries, 0.3, resume=folder / "checkpoint-4")  # a path, as the message says; pathlib's too
    assert torch.equal(weights(again), weights(old))
    assert again.session.run == old.session.run
    assert latest_complete(folder) == folder / "checkpoint-6"


@pytest.mark.parametrize(("stop", "expected"), [(3, "checkpoint-2"), (5, "checkpoint-4")])
def test_run_resumed_from_an_earlier_step_continues_from_there(stop, expected, queries, tmp_path):
    """Its later checkpoints of before are of the same run, and not what it goes on from."""
    first = train(tmp_path, queries, 0.3)
    train(tmp_path, queries, 0.01, resume=str(tmp_path / "checkpoint-2"), stop=stop)
    assert steps(tmp_path) == [2, 4, 6]
    assert latest_complete(tmp_path) == tmp_path / expected
    (tmp_path / checkpoints.LATEST).unlink()  # what the checkpoints say of themselves is enough, once there is one
    assert latest_complete(tmp_path) == tmp_path / (expected if stop == 5 else "checkpoint-6")
    assert session_of(tmp_path / "checkpoint-4").run == first.session.run


def test_copied_folder_resumes_like_the_original(queries, tmp_path):
    expected = train(tmp_path / "a", queries, 0.1)
    train(tmp_path / "b", queries, 0.1, stop=5)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    shutil.rmtree(tmp_path / "b")
    assert torch.equal(weights(train(tmp_path / "c", queries, 0.1, resume=True)), weights(expected))


def checkpoint(folder, step, session):
    """A complete checkpoint without content."""
    with checkpoints.atomic_checkpoint(folder / f"checkpoint-{step}", True, session) as staged:
        (staged / "weights").write_text("x")
    return folder / f"checkpoint-{step}"


def test_resuming_among_two_runs_is_refused_when_run_json_is_damaged(tmp_path, caplog):
    checkpoint(tmp_path, 2, Session("a", 1))
    checkpoint(tmp_path, 8, Session("b", 1))
    checkpoint(tmp_path, 4, Session("a", 1))
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / checkpoints.LATEST).write_text("{")
    with pytest.raises(ValueError, match=r"of 2 runs \(checkpoint-2, checkpoint-4, checkpoint-8\) and no run.json"):
        to_resume(tmp_path)
    assert "run.json is damaged" in caplog.text
    checkpoint(tmp_path, 6, Session("b", 2))
    (tmp_path / checkpoints.LATEST).unlink()
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-6"  # of the higher number


def test_torn_checkpoint_falls_back_to_the_one_that_was_resumed(tmp_path):
    checkpoint(tmp_path, 2, Session("a", 1))
    resumed = checkpoint(tmp_path, 4, Session("a", 1))
    other = checkpoint(tmp_path, 6, Session("a", 1))
    torn = checkpoint(tmp_path, 8, Session("a", 2, str(resumed)))
    (torn / "weights").unlink()
    assert latest_complete(tmp_path) == resumed
    (resumed / "weights").unlink()
    assert latest_complete(tmp_path) == other
    assert Session.next_in(tmp_path, str(other)) == Session("a", 3, str(other))


def test_checkpoints_without_a_run_id_count_as_one_run(queries, tmp_path):
    """They have no id; the run that goes on from them gets one, and none of them is deleted for it."""
    expected = train(tmp_path / "a", queries, 0.1)
    folder = tmp_path / "b"
    train(folder, queries, 0.1, stop=5)
    for path in folder.glob("checkpoint-*/checkpoint.json"):
        about = json.loads(path.read_text())
        for name in ("run", "session", "resumed_from"):
            del about[name]
        path.write_text(json.dumps(about))
    (folder / checkpoints.LATEST).unlink()
    assert latest_complete(folder) == folder / "checkpoint-4"
    stopped = train(folder, queries, 0.1, resume=True, stop=5, save_total_limit=1)
    assert latest_complete(folder) == folder / "checkpoint-4"  # again, since the run has none of its own yet
    resumed = train(folder, queries, 0.1, resume=True, save_total_limit=1)
    assert torch.equal(weights(resumed), weights(expected))
    assert session_of(folder / "checkpoint-6").run == resumed.session.run != ""
    assert stopped.session.run
    assert steps(folder) == [2, 4, 6]


@pytest.mark.parametrize("best", [False, True])
def test_save_total_limit_counts_the_checkpoints_of_its_own_run(best, queries, tmp_path):
    old = train(tmp_path, queries, 0.1, max_steps=12, save_steps=6)
    new = train(tmp_path, queries, 0.05, save_steps=1, max_steps=3, save_total_limit=1, **(EVALUATED if best else {}))
    kept = {path.name: session_of(path).run for path in tmp_path.glob("checkpoint-*")}
    old_ones = dict.fromkeys(["checkpoint-6", "checkpoint-12"], old.session.run)
    assert kept == {"checkpoint-1" if best else "checkpoint-3": new.session.run} | old_ones


class FirstIsBest(BaseEvaluator):
    """A metric that falls with every step."""

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return {"luck": -steps}


EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "luck",
    "greater_is_better": True,
}


def test_best_checkpoint_is_never_of_another_run(queries, tmp_path, caplog):
    """The new run is best at a step that it does not save, of which the old run has left a checkpoint."""
    old = train(tmp_path, queries, 0.05, save_steps=1)
    new = train(tmp_path, queries, 0.3, save_steps=3, max_steps=3, **EVALUATED)
    assert new.state.best_global_step == 1
    assert session_of(tmp_path / "checkpoint-1").run == old.session.run
    assert new.state.best_model_checkpoint is None
    assert "No checkpoint was saved at the best step" in caplog.text
    new.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-1 was the best checkpoint, but another run has replaced it"):
        new._load_best_model()


@pytest.mark.parametrize("gone", [False, True])
def test_best_checkpoint_is_found_in_a_copied_folder(gone, queries, tmp_path, caplog):
    """The first step is best. In the copy, the original's place is taken by another run."""
    settings = {**EVALUATED, "save_steps": 1, "max_steps": 4}
    first = train(tmp_path / "a", queries, 0.3, stop=3, **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    train(tmp_path / "a", queries, 0.05, save_steps=1)
    if gone:
        shutil.rmtree(tmp_path / "b" / "checkpoint-1")
    resumed = train(tmp_path / "b", queries, 0.3, resume=True, **settings)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "b" / ("checkpoint-4" if gone else "checkpoint-1"))
    assert resumed.session.run == first.session.run
    assert (f"{tmp_path / 'a' / 'checkpoint-1'}, the best checkpoint of the run, is missing" in caplog.text) == gone


def test_checkpoint_of_the_model_alone_cannot_be_resumed(queries, tmp_path):
    train(tmp_path, queries, 0.05, save_only_model=True)
    for resume in (True, tmp_path / "checkpoint-2"):
        with pytest.raises(ValueError, match=r"was saved with save_only_model and has no optimizer\.pt"):
            train(tmp_path, queries, 0.05, resume=resume)


def test_missing_checkpoint_is_named(queries, tmp_path):
    with pytest.raises(ValueError, match="checkpoint-9 is not a complete checkpoint: there is no such folder"):
        train(tmp_path, queries, 0.05, resume=tmp_path / "checkpoint-9")


def test_replaced_checkpoint_is_reported(queries, tmp_path, caplog):
    old = train(tmp_path, queries, 0.05, max_steps=2)
    train(tmp_path, queries, 0.05, max_steps=2)
    assert f"{tmp_path / 'checkpoint-2'} of another run ({old.session.run})" in caplog.text


def test_run_without_checkpoints_is_not_the_latest(queries, tmp_path):
    saved = train(tmp_path, queries, 0.05)
    other = train(tmp_path, queries, 0.05, save_strategy="no")
    assert other.session.run != saved.session.run
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-6"


def test_resume_from_checkpoint_accepts_text_of_a_command_line(queries, tmp_path):
    train(tmp_path, queries, 0.1, stop=3)
    for text, step in [("false", 0), ("", 0), ("True", 2), ("true", 2)]:
        trainer = train(tmp_path, queries, 0.1, resume=text, stop=5, save_strategy="no")
        assert trainer.session.resumed_from == (str(tmp_path / "checkpoint-2") if step else None), text
    (tmp_path / "checkpoint-2").rename(tmp_path / "true")
    trainer = train(tmp_path, queries, 0.1, resume=tmp_path / "true", stop=5, save_strategy="no")
    assert trainer.session.resumed_from == str(tmp_path / "true")
    for wrong in (1, 2.0, ["checkpoint-2"]):
        with pytest.raises(ValueError, match=r"resume_from_checkpoint must be True, False or the path"):
            trainer.train(resume_from_checkpoint=wrong)
