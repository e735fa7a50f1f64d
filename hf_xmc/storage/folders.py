"""Atomic folders: they appear complete or not at all, even if the process or the machine stops."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder to write to, which replaces ``folder`` when the block ends.

    If the block fails, ``folder`` is unchanged. A process that is killed in the block leaves a folder ``NAME.new-PID``,
    which can be deleted. If ``folder`` is a link, the link stays and its target is replaced.

    Raises:
        ValueError: if the current directory is ``folder`` or is inside it.
    """
    folder = folder.resolve()
    _check_not_current(folder)
    new = folder.with_name(f"{folder.name}.new-{os.getpid()}")
    new.mkdir(parents=True)
    try:
        yield new
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(folder: Path, marker: str, expected: str) -> None:
    """Check before a long computation that :func:`atomic_folder` may replace a folder.

    Args:
        folder: The folder. It may be replaced if it is missing, if it is empty, or if it holds the file ``marker``.
        marker: Name of the file that identifies a folder written by this package.
        expected: Reason for the refusal, which completes "FOLDER exists and ...".

    Raises:
        ValueError: if the folder has other content, is a file, or contains the current directory.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Choose another folder.")
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).exists():
        raise ValueError(f"{folder} exists and {expected}. Choose another folder. This one is unchanged.")
    _check_not_current(folder.resolve())


def _check_not_current(folder: Path) -> None:
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"{folder} contains the current directory, which would disappear when the folder is replaced. Save to "
            "another folder, or change to another directory first."
        )


def replace_folder(new: Path, folder: Path) -> None:
    """Rename the folder ``new`` to ``folder``. An existing ``folder`` is renamed to ``new``.

    All files and folders get the mode that the umask gives to new ones. They are written to the disk before the rename.
    Linux exchanges the two names in one step. On other systems the old folder is called ``NAME.old-PID`` for a moment,
    while ``folder`` is missing.
    """
    give_default_modes(new, new.rglob("*"))
    for path in [*new.rglob("*"), new]:
        _sync(path)
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        new.rename(folder)
        old.rename(new)
    _sync(folder.parent)


def give_default_modes(folder: Path, paths: Iterable[Path]) -> None:
    """Give files and folders in ``folder`` the mode that the umask of this process gives to new ones.

    Some libraries, such as safetensors, write through temporary files that only the owner can read. Links are not
    changed.
    """
    probe = folder / f".mode-{os.getpid()}"  # reading the umask would change it for all threads
    probe.mkdir(exist_ok=True)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in paths:
        wanted = mode if path.is_dir() else mode & 0o666
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != wanted:
            path.chmod(wanted)


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it has either the old or the new text, even if the process or the machine stops."""
    new = file.with_name(f"{file.name}.new-{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    new.replace(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step, and return whether the system supports that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    done: int = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0
