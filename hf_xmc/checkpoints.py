"""Checkpoints that are whole or not there, and the newest whole one found again."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from hf_xmc import sharding
from hf_xmc.atomic import give_default_modes, put_in_place
from hf_xmc.finite import refuse_non_finite

logger = logging.getLogger(__name__)

LOSS_WEIGHTS = "loss.safetensors"
MARKER = "checkpoint.json"  # written last: its names and sizes tell a whole checkpoint from a torn one
STAGING = "checkpoint.saving"  # within the run's folder: what a killed process leaves, and the next save clears
FOLDER = re.compile(r"checkpoint-(\d+)")


@contextmanager
def saved_whole(folder: Path, is_main: bool) -> Iterator[Path]:
    """A folder that every process writes its part of a checkpoint into; it becomes ``folder`` when all have.

    The steps: an empty folder under another name, the files of all processes, the marker, everything synced to the
    disk, the rename. What happens before the rename leaves older checkpoints as they are.
    """
    staged = folder.parent / STAGING / folder.name
    if is_main:
        shutil.rmtree(staged.parent, ignore_errors=True)
        staged.mkdir(parents=True)
    sharding.barrier()  # no process writes into what is being cleared
    try:
        yield staged
        sharding.barrier()  # every process has written its part
        if is_main:
            files = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
            (staged / MARKER).write_text(json.dumps({"num_processes": sharding.world_size(), "files": files}, indent=2))
            put_in_place(staged, folder)
    except BaseException as error:
        free, whole = shutil.disk_usage(folder.parent).free >> 20, newest(folder.parent)
        logger.error(
            "%s was not saved (%s; %s MiB are free); the newest whole checkpoint is %s.", folder, error, free, whole
        )
        raise
    finally:
        if is_main:
            shutil.rmtree(staged.parent, ignore_errors=True)
    sharding.barrier()  # it is there for every process


def newest(run_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step; what is skipped on the way is logged with the reason."""
    run_dir = Path(run_dir)
    found = [(int(name[1]), path) for path in run_dir.glob("*") if (name := FOLDER.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        reason = why_torn(path)
        if reason is None:
            return path
        logger.warning("Skipping %s: %s.", path, reason)
    return None


def why_torn(folder: Path) -> str | None:
    """What a checkpoint lacks, or ``None`` for a whole one."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so it was not saved to the end, or by another trainer"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} is damaged ({error})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and {size} were saved"
    return None


def check_whole(folder: str | Path) -> None:
    """Raise ``ValueError`` for a checkpoint that is torn, and warn of one that cannot be resumed exactly."""
    if reason := why_torn(Path(folder)):
        raise ValueError(
            f"{folder} is no whole checkpoint: {reason}. Resume with `resume_from_checkpoint=True`, which takes the "
            "newest whole one."
        )
    saved_by = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))["num_processes"]
    if saved_by != sharding.world_size():
        logger.warning(
            "%s was saved by %s process(es), and %s resume it: the run goes on with other batches and random numbers "
            "than it would have.",
            folder,
            saved_by,
            sharding.world_size(),
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def own_state(loss: nn.Module) -> dict[str, Tensor]:
    """What a loss itself has learned, such as a bias, which the encoder's own files do not hold."""
    return {name: value for name, value in loss.state_dict().items() if not name.startswith("model.")}


class CheckpointingTrainer(SentenceTransformerTrainer):
    """The stock trainer, with checkpoints that are whole or not there.

    A subclass that has a state of its own to save writes it in :meth:`save_state`, within the same guarantee.
    """

    loss: nn.Module  # type: ignore[assignment]
    _staging: str | None = None  # where the stock code writes while a checkpoint is being saved

    def save_state(self, folder: Path) -> None:
        """Write what this process needs to go on, in addition to the weights; every process calls it."""

    def load_state(self, folder: Path) -> None:
        """Read what :meth:`save_state` has written."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if learned := own_state(self.loss):
            save_file(learned, Path(output_dir or str(self.args.output_dir)) / LOSS_WEIGHTS)

    def _load_from_checkpoint(self, checkpoint_path: str, *args: Any) -> None:
        super()._load_from_checkpoint(checkpoint_path, *args)
        if learned := own_state(self.loss):
            saved = load_file(Path(checkpoint_path) / LOSS_WEIGHTS)
            for name, value in learned.items():
                value.copy_(saved[name])
        self.load_state(Path(checkpoint_path))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        refuse_non_finite(self.loss.named_parameters(), f"the weights of step {self.state.global_step}")
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        with saved_whole(folder, self.args.should_save) as staged:
            self._staging = str(staged.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.save_state(staged)
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best == folder or best.exists()):
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:  # else it is part of a checkpoint
            folder = Path(output_dir or str(self.args.output_dir))
            give_default_modes(folder, folder.rglob("*.safetensors"))

    def _load_best_model(self) -> None:
        # The stock method logs an error and leaves the last weights in place of the best.
        best = str(self.state.best_model_checkpoint)
        check_whole(best)
        self._load_from_checkpoint(best)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the stock trainer; ``True`` resumes from the newest checkpoint that is whole.

        Raises:
            ValueError: there is none, or the one that is named is torn.
        """
        if resume_from_checkpoint is True:
            found = newest(str(self.args.output_dir))
            if found is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)
