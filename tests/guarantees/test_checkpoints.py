"""Whatever interrupts a save, the previous checkpoint is complete, and a resumed run ends the same bit for bit."""

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, make_static_encoder
from helpers.training import tiny_arguments
from tqdm.auto import tqdm

from hf_xmc import (
    XMCData,
    XMCEvaluator,
    XMCModel,
    XMCTrainer,
    load_xmc,
)
from hf_xmc.training import checkpoints

SEEDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
FILE_OPERATIONS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
}


def trainer_of(folder, queries, max_steps, save_steps=2, evaluator=None, **settings):
    settings = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": save_steps, **settings}
    args = tiny_arguments(folder, **settings)
    return XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, evaluator=evaluator)


def weights(encoder):
    return encoder[0].embedding.weight.detach().clone()


def in_a_process_of_its_own(work):
    """Run ``work`` in a forked process and return its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            logging.disable()
            work()
            code = 0
        except BaseException:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(number, work):
    """Run ``work`` in a process that is killed before this file operation, and return whether it was killed."""

    def limited():
        left = [number]

        def hook(event, _):
            if event in FILE_OPERATIONS:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    code = in_a_process_of_its_own(limited)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def moments(work, every):
    """Kill ``work`` at its file operation 0, ``every``, 2 ``every``, ... and yield after each kill."""
    number = last = 0
    while killed_at(number, work):
        yield number
        last, number = number, number + every
    assert last > 20, "the work touched no files: the test tests nothing"


sparsely_and_fully = pytest.mark.parametrize(
    "every", [pytest.param(7, id="7th"), pytest.param(1, marks=pytest.mark.slow)]
)


@pytest.fixture
def run(queries, tmp_path):
    """Return a run with a checkpoint at step 2 that is about to save step 4, its folder, and its weights at both."""
    trainer = trainer_of(tmp_path / "run", queries, max_steps=4)
    saved = {}
    stock = trainer._save_checkpoint

    def save(model, trial):
        saved[trainer.state.global_step] = weights(trainer.model)
        if trainer.state.global_step == 2:
            stock(model, trial)

    trainer._save_checkpoint = save
    trainer.train()
    trainer._save_checkpoint = stock
    assert not torch.equal(saved[2], saved[4])
    return trainer, tmp_path / "run", saved


def loaded(checkpoint):
    """Return step and weights of a checkpoint, as a trainer of the same kind resumes from it."""
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    trainer = trainer_of(checkpoint.parent / "again", Dataset.from_dict({"text": ["x"], "label_ids": [[0]]}), step)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return step, weights(trainer.model)


@pytest.mark.promise("A run killed at any file operation of saving a checkpoint has a complete checkpoint")
@sparsely_and_fully
def test_checkpoint_is_complete_when_killed_at_any_file_operation(every, run, tally, tmp_path):
    trainer, folder, saved = run
    shutil.copytree(folder, tmp_path / "before")
    seen = set()
    for _ in moments(lambda: trainer._save_checkpoint(trainer.model, None), every):
        found = checkpoints.latest_complete(folder)
        step, got = loaded(found)
        assert found.name == f"checkpoint-{step}"
        tally(faults=1, lost=int(not torch.equal(got, saved[step])))
        assert torch.equal(got, saved[step])
        seen.add(step)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
    assert seen <= {2, 4}
    assert every > 1 or seen == {2, 4}, "no kill came after the new checkpoint was in place"


@pytest.mark.promise("A model or data set being replaced is complete, old or new, after a kill at any file operation")
@pytest.mark.parametrize("kind", ["model", "data"])
@sparsely_and_fully
def test_replaced_folder_is_complete_when_killed_at_any_file_operation(every, kind, queries, tally, tmp_path):
    folder = tmp_path / "saved"
    labels = Dataset.from_dict({"uid": LABELS, "text": LABELS})
    if kind == "model":
        old, new = XMCModel(make_static_encoder(), LABELS), XMCModel(make_static_encoder(), LABELS[:7])
        save = (lambda: old.save_pretrained(folder)), (lambda: new.save_pretrained(folder))

        def size():
            return XMCModel.from_pretrained(folder, device="cpu").index.num_labels
    else:
        data = XMCData(train=queries, labels=labels), XMCData(train=queries.select(range(7)), labels=labels)
        save = (lambda: data[0].save(folder)), (lambda: data[1].save(folder))

        def size():
            return len(load_xmc(folder).train)

    save[0]()
    seen, before = set(), size()
    for _ in moments(save[1], every):
        seen.add(found := size())
        tally(faults=1, lost=int(found not in (before, 7)))
        if found != before:
            save[0]()
        for leftover in tmp_path.glob("saved.*"):
            shutil.rmtree(leftover)
    save[1]()
    assert seen <= {before, 7}
    assert size() == 7
    assert every > 1 or seen == {before, 7}, "no kill came after the new one was in place"


def test_killed_process_keeps_no_lock_of_progress_bars():
    """The tests below kill processes that may be drawing a bar; all bars of this process would wait for the lock."""

    def work():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    tqdm.get_lock()
    assert in_a_process_of_its_own(work) == -signal.SIGKILL
    assert tqdm.get_lock().acquire(timeout=5)
    tqdm.get_lock().release()


@pytest.mark.promise("A run killed repeatedly at random moments and resumed ends like an uninterrupted run")
@pytest.mark.parametrize("seed", [*SEEDS[:2], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[2:])])
def test_run_killed_repeatedly_ends_like_an_uninterrupted_one(seed, queries, tally, tmp_path):
    def work():
        trainer = trainer_of(tmp_path / "run", queries, max_steps=12, save_steps=1, save_total_limit=2)
        trainer.train(resume_from_checkpoint=checkpoints.latest_complete(tmp_path / "run") is not None)
        torch.save(weights(trainer.model), tmp_path / "end.pt")

    rng = random.Random(seed)
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                logging.disable()
                work()
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.05, 1.0))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tally(faults=1)
    work()
    whole = trainer_of(tmp_path / "whole", queries, max_steps=12, save_steps=20)
    whole.train()
    assert torch.equal(torch.load(tmp_path / "end.pt"), weights(whole.model))


def mount(folder, options):
    """Mount a disk in memory if permitted, and return whether it worked; only root may."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder and a context that limits its free space, or the size of files if no disk can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount(folder, "size=64m"):
        yield folder, no_file_beyond
        return

    @contextmanager
    def no_room_beyond(size):
        used = shutil.disk_usage(folder).used
        assert mount(folder, f"remount,size={used + size}")
        try:
            yield
        finally:
            assert mount(folder, "remount,size=64m")

    yield folder, no_room_beyond
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def no_file_beyond(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.promise("If the disk fills during a save, the previous checkpoint stays and the next save works")
@pytest.mark.parametrize("kind", ["disk", "file"])
def test_full_disk_leaves_the_previous_checkpoint(kind, run, small_disk, tally, caplog):
    trainer, folder, saved = run
    disk, limit = small_disk
    if kind == "file":
        limit = no_file_beyond
    shutil.copytree(folder / "checkpoint-2", disk / "checkpoint-2")
    trainer.args.output_dir = str(disk)
    sizes = [path.stat().st_size for path in (folder / "checkpoint-2").rglob("*") if path.is_file()]
    top = max(sizes) if limit is no_file_beyond else sum(sizes)
    for eighth in range(8):
        caplog.clear()
        with limit(top * eighth // 8 + 4096 * (limit is not no_file_beyond)), pytest.raises(Exception) as raised:
            trainer._save_checkpoint(trainer.model, None)
        # safetensors and Python name the error; torch has these two for it.
        words = "No space left|File too large|unexpected pos|iostream error"
        assert re.search(words, str(raised.value)), raised.value
        assert f"checkpoint-4 was not saved ({raised.value}; " in caplog.text
        assert f"The latest complete checkpoint is {disk / 'checkpoint-2'}" in caplog.text
        assert [path.name for path in disk.iterdir()] == ["checkpoint-2"]
        assert torch.equal(loaded(checkpoints.latest_complete(disk))[1], saved[2])
        shutil.rmtree(disk / "again", ignore_errors=True)
        tally(faults=1)
    trainer._save_checkpoint(trainer.model, None)
    assert torch.equal(loaded(checkpoints.latest_complete(disk))[1], saved[4])


@pytest.mark.promise("A truncated or modified checkpoint is skipped, and the reason is given")
def test_latest_complete_checkpoint_is_found_and_skipped_ones_are_reported(run, tally, caplog):
    trainer, folder, _ = run
    trainer._save_checkpoint(trainer.model, None)
    assert checkpoints.latest_complete(folder).name == "checkpoint-4"
    torn = folder / "checkpoint-4"
    names = [path.relative_to(torn).as_posix() for path in torn.rglob("*") if path.is_file()]
    assert {"checkpoint.json", "optimizer.pt", "rng_state.pth", "model.safetensors"} <= {Path(n).name for n in names}
    for name in names:
        content = (torn / name).read_bytes()
        for damage in ("missing", "cut"):
            (torn / name).write_bytes(content[:-1]) if damage == "cut" else (torn / name).unlink()
            caplog.clear()
            assert checkpoints.latest_complete(folder).name == "checkpoint-2"
            assert f"Skipping {torn}: " in caplog.text
            assert name in caplog.text
            with pytest.raises(ValueError, match=r"checkpoint-4 is not a complete checkpoint: .*Resume with"):
                trainer.train(resume_from_checkpoint=str(torn))
            tally(faults=1)
            (torn / name).write_bytes(content)
    assert checkpoints.latest_complete(folder) == torn


def test_resuming_is_refused_without_a_complete_checkpoint(run, tmp_path):
    trainer, folder, _ = run
    trainer.args.output_dir = str(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty holds no complete checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    about = folder / "checkpoint-2" / "checkpoint.json"
    for damaged in (b"[]", b"{}", b"{", b"\xff"):
        about.write_bytes(damaged)
        assert "checkpoint.json is damaged" in checkpoints.why_incomplete(folder / "checkpoint-2")
    about.unlink()
    about.mkdir()
    assert "checkpoint.json is damaged" in checkpoints.why_incomplete(folder / "checkpoint-2")


def test_leftovers_are_neither_resumed_from_nor_saved(run):
    """Leftovers: a copy under a similar name, files of a killed save, and a truncated checkpoint of the next step."""
    trainer, folder, saved = run
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9-copy")
    assert checkpoints.latest_complete(folder).name == "checkpoint-2"
    left = folder / checkpoints.STAGING / "checkpoint-4"
    left.mkdir(parents=True)
    (left / "left.bin").write_text("x")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-4")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = trainer_of(folder, Dataset.from_dict({"text": ["x"], "label_ids": [[0]]}), max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), saved[2])
    trainer._save_checkpoint(trainer.model, None)
    assert not left.exists()
    assert not (folder / "checkpoint-4" / "left.bin").exists()
    assert torch.equal(loaded(checkpoints.latest_complete(folder))[1], saved[4])


def test_checkpoint_is_marked_complete_before_it_gets_its_name(run, monkeypatch):
    trainer, folder, _ = run
    stock = checkpoints.replace_folder

    def replace_folder(new, to):
        assert checkpoints.why_incomplete(new) is None
        stock(new, to)

    monkeypatch.setattr(checkpoints, "replace_folder", replace_folder)
    trainer._save_checkpoint(trainer.model, None)
    assert checkpoints.latest_complete(folder).name == "checkpoint-4"


def test_another_number_of_processes_is_reported(run, caplog):
    _, folder, _ = run
    checkpoints.check_complete(folder / "checkpoint-2")
    assert not caplog.text
    about = folder / "checkpoint-2" / "checkpoint.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "num_processes": 3}))
    checkpoints.check_complete(folder / "checkpoint-2")
    assert "was saved on 3 process(es) and is resumed on 1" in caplog.text


def test_old_checkpoints_are_deleted_after_a_save_and_the_best_one_is_kept(queries, tmp_path):
    data = XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS}), validation=queries)
    trainer = trainer_of(
        tmp_path,
        queries,
        max_steps=6,
        save_steps=1,
        save_total_limit=2,
        evaluator=XMCEvaluator.from_data(data, "validation"),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="P@5",
        load_best_model_at_end=True,
    )
    trainer.args.learning_rate = 3.0  # too high on purpose: some later step is worse
    trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert kept == {"checkpoint-6", best}
    assert trainer.state.best_model_checkpoint == str(tmp_path / best)
    for name in kept:  # the best one names itself, by the name that it has now
        about = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert about["best_model_checkpoint"] == str(tmp_path / best)
    (tmp_path / best / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"is not a complete checkpoint: optimizer\.pt is missing"):
        trainer._load_best_model()
