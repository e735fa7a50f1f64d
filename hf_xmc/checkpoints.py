"""Checkpoints that are whole or not there, and the newest whole one found again."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_xmc import sharding
from hf_xmc.atomic import put_in_place

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
