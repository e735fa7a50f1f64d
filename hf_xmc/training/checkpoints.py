"""Atomic checkpoints, and the search for the latest complete one of the last run."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME

from hf_xmc import distributed
from hf_xmc.storage.folders import replace_folder, write_atomically

logger = logging.getLogger(__name__)

MARKER = "checkpoint.json"  # written last: file names and sizes, which show whether a checkpoint is complete
STAGING = "checkpoint.saving"  # in the run's folder; the next save clears what a killed process left
LATEST = "run.json"  # in the run's folder: the last training that started there
FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Session:
    """One call of ``train``, from its start or from a checkpoint.

    Args:
        run: Id of the run, which a training that resumes takes over; empty for checkpoints of older versions.
        number: Number of the training in its folder. The last training has the highest, independent of clocks.
        resumed_from: Path of the checkpoint that was resumed.
    """

    run: str = ""
    number: int = 0
    resumed_from: str | None = None

    @classmethod
    def of(cls, file: Path) -> Session:
        """Return the session that a file names, or one without an id."""
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            return cls(str(about["run"]), int(about["session"]), about["resumed_from"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    @classmethod
    def next_in(cls, run_dir: Path, resumed_from: str | None = None) -> Session:
        """Return the session that starts in ``run_dir`` now."""
        files = [run_dir / LATEST, *(path / MARKER for path in _checkpoints(run_dir))]
        number = 1 + max(cls.of(file).number for file in files)
        if resumed_from is None:
            return cls(uuid.uuid4().hex, number)
        return cls(session_of(resumed_from).run or uuid.uuid4().hex, number, str(Path(resumed_from).resolve()))

    def about(self) -> dict[str, Any]:
        """Return the fields that :meth:`of` reads."""
        return {"run": self.run, "session": self.number, "resumed_from": self.resumed_from}

    def write_as_latest(self, run_dir: Path) -> None:
        """Record this session as the last one of ``run_dir``."""
        if Session.of(run_dir / LATEST) != self:
            write_atomically(run_dir / LATEST, json.dumps(self.about(), indent=2))


def session_of(checkpoint: str | Path) -> Session:
    """Return the session that saved a checkpoint."""
    return Session.of(Path(checkpoint) / MARKER)


@contextmanager
def atomic_checkpoint(folder: Path, is_main: bool, session: Session) -> Iterator[Path]:
    """Yield a staging folder for the files of all processes, and rename it to ``folder`` when they are complete.

    The steps are: create an empty folder, write the files of all processes, write the marker, sync everything to the
    disk, rename. A failure before the rename leaves older checkpoints unchanged.
    """
    staged = folder.parent / STAGING / folder.name
    if is_main:
        shutil.rmtree(staged.parent, ignore_errors=True)
        staged.mkdir(parents=True)
    distributed.barrier()  # no process writes into a folder that is being cleared
    try:
        yield staged
        distributed.barrier()  # every process has written its part
        if is_main:
            files = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
            about = {"num_processes": distributed.world_size(), **session.about(), "files": files}
            (staged / MARKER).write_text(json.dumps(about, indent=2))
            replaced = session_of(folder)
            if folder.exists() and replaced.run != session.run:
                logger.warning("Replacing %s of another run (%s).", folder, replaced.run or "without an id")
            replace_folder(staged, folder)
            session.write_as_latest(folder.parent)
    except BaseException as error:
        free, whole = shutil.disk_usage(folder.parent).free >> 20, latest_complete(folder.parent, session)
        logger.error(
            "%s was not saved (%s; %s MiB are free). The latest complete checkpoint is %s.", folder, error, free, whole
        )
        raise
    finally:
        if is_main:
            shutil.rmtree(staged.parent, ignore_errors=True)
    distributed.barrier()  # every process can read it now


def latest_complete(run_dir: str | Path, session: Session | None = None) -> Path | None:
    """Return the checkpoint from which the last run in a folder resumes, and log skipped ones with the reason.

    It is the complete checkpoint of the highest step that the run's last session saved. Without one, it is the
    checkpoint that this session resumed, or else one of an earlier session of the run. Checkpoints of other
    runs are never taken.

    Args:
        run_dir: The folder of the run.
        session: The last session, if it is known.

    Raises:
        ValueError: if there are checkpoints of several runs, and the last run is unknown.
    """
    run_dir = Path(run_dir)
    latest, found = session or latest_session(run_dir), _checkpoints(run_dir)
    own = sorted((path for path in found if session_of(path).run == latest.run), key=_age, reverse=True)
    if latest.resumed_from is not None:
        last = [path for path in own if session_of(path).number == latest.number]
        own = list(dict.fromkeys([*last, *_resumed_by(latest, run_dir), *own]))
    for path in found:
        if path not in own:
            logger.warning("Skipping %s: %s.", path, why_incomplete(path) or "it is of another run")
    for path in own:
        reason = why_incomplete(path)
        if reason is None:
            return path
        logger.warning("Skipping %s: %s.", path, reason)
    return None


def latest_session(run_dir: Path) -> Session:
    """Return the last session in a folder: the recorded one, or else the one with the highest number.

    Raises:
        ValueError: if none is recorded, and several runs have that number.
    """
    if (named := Session.of(run_dir / LATEST)).run:
        return named
    if (run_dir / LATEST).exists():
        logger.warning("%s is damaged. The last run is taken from the checkpoints.", run_dir / LATEST)
    whole = [path for path in _checkpoints(run_dir) if why_incomplete(path) is None]
    last = max((session_of(path).number for path in whole), default=0)
    runs = {session.run: session for path in whole if (session := session_of(path)).number == last}
    if len(runs) > 1:
        raise ValueError(
            f"{run_dir} holds checkpoints of {len(runs)} runs ({', '.join(path.name for path in whole)}) and no "
            f"{LATEST} that names the last one. Pass the path of the checkpoint to resume from."
        )
    return next(iter(runs.values()), Session())


def as_argument(given: object) -> str | bool:
    """Return ``resume_from_checkpoint`` as ``True``, ``False`` or a path.

    A command line and a YAML file give ``true`` and ``false`` as text. A folder with such a name needs a ``Path``.

    Raises:
        ValueError: if it has any other value.
    """
    if isinstance(given, str):
        return {"true": True, "false": False, "none": False, "": False}.get(given.lower(), given)
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if given is None or isinstance(given, bool):
        return bool(given)
    raise ValueError(f"resume_from_checkpoint must be True, False or the path of a checkpoint, got {given!r}.")


def to_resume(run_dir: str | Path) -> Path:
    """Return the checkpoint for ``resume_from_checkpoint=True``.

    Raises:
        ValueError: if the last run in the folder has no complete checkpoint.
    """
    run_dir = Path(run_dir)
    if (found := latest_complete(run_dir)) is not None:
        return found
    others = sorted((path for path in _checkpoints(run_dir) if why_incomplete(path) is None), key=_age)
    if others:
        raise ValueError(
            f"the last run in {run_dir} has no complete checkpoint to resume from. {others[-1]} is of another run: "
            "pass its path to continue that run, or resume_from_checkpoint=None to start again."
        )
    raise ValueError(f"{run_dir} holds no complete checkpoint to resume from. Start with resume_from_checkpoint=None.")


def delete_old(run_dir: Path, session: Session, limit: int | None, kept: Iterable[str | Path | None]) -> None:
    """Delete the oldest checkpoints of a session's run until ``limit`` are left. Keep those of other runs.

    Args:
        run_dir: The folder of the run.
        session: The session that trains.
        limit: Maximum number of checkpoints; ``None`` or 0 for no maximum.
        kept: Checkpoints that are never deleted.
    """
    own = sorted((path for path in _checkpoints(run_dir) if session_of(path).run == session.run), key=_age)
    protected = {Path(path).resolve() for path in kept if path is not None}
    removable = [path for path in own if path.resolve() not in protected]
    for path in removable[: max(0, len(own) - limit) if limit else 0]:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.glob("*") if FOLDER.fullmatch(path.name))


def _age(checkpoint: Path) -> tuple[int, int]:
    name = FOLDER.fullmatch(checkpoint.name)
    return session_of(checkpoint).number, int(name[1]) if name else 0


def _resumed_by(session: Session, run_dir: Path) -> list[Path]:
    """Return the checkpoint that a session resumed, from its recorded path or from ``run_dir`` if it was moved."""
    before = Path(str(session.resumed_from))
    there = [path for path in (before, run_dir / before.name) if path.is_dir()]
    return [path for path in there if session_of(path).run in (session.run, "")][:1]


def why_incomplete(folder: Path) -> str | None:
    """Return why a checkpoint is incomplete, or ``None`` if it is complete."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so saving it was interrupted, or another trainer saved it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} is damaged ({error})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def check_complete(folder: str | Path) -> None:
    """Raise ``ValueError`` for an incomplete checkpoint, and warn of one that cannot be resumed exactly."""
    if reason := why_incomplete(Path(folder)):
        raise ValueError(
            f"{folder} is not a complete checkpoint: {reason}. Resume with `resume_from_checkpoint=True`, which uses "
            "the latest complete one."
        )
    saved_by = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))["num_processes"]
    if saved_by != distributed.world_size():
        logger.warning(
            "%s was saved on %s process(es) and is resumed on %s, so its batches and random numbers will differ from "
            "those of an uninterrupted run.",
            folder,
            saved_by,
            distributed.world_size(),
        )


def check_resumable(folder: str | Path) -> None:
    """Raise ``ValueError`` for a checkpoint without an optimizer state."""
    if not (Path(folder) / OPTIMIZER_NAME).exists():
        raise ValueError(
            f"{folder} was saved with save_only_model and has no {OPTIMIZER_NAME}, so it cannot be resumed. Start a "
            "new run with its model, SentenceTransformer(path)."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
