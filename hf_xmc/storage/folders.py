"""Folders that appear whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder to write into, which takes the place of ``folder`` when the block ends.

    If the block fails, ``folder`` is as it was. A process that is killed meanwhile leaves ``NAME.new-PID`` next to it,
    which can be deleted. Where ``folder`` is a link, it stays one, and what it leads to is replaced.

    Raises:
        ValueError: if the current directory is ``folder`` or is inside it.
    """
    folder = folder.resolve()
    _refuse_current(folder)
    new = folder.with_name(f"{folder.name}.new-{os.getpid()}")
    new.mkdir(parents=True)
    try:
        yield new
        put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(folder: Path, marker: str, expected: str) -> None:
    """Raise if :func:`whole_folder` may not replace a folder, so that nothing is done before in vain.

    Args:
        folder: The folder. It may be replaced if it is missing, empty, or holds the file ``marker``.
        marker: The name of a file that shows what a folder is.
        expected: What such a folder holds, for the message.

    Raises:
        ValueError: if it holds something else, is a file, or the process works in it.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: choose another folder.")
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).exists():
        raise ValueError(f"{folder} exists and {expected}: choose another folder, it is left as it is.")
    _refuse_current(folder.resolve())


def _refuse_current(folder: Path) -> None:
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"{folder} holds the current directory, which would be gone once it is replaced: save to another folder, "
            "or change to another directory first."
        )


def put_in_place(new: Path, folder: Path) -> None:
    """Give the folder ``new`` the name ``folder``; if there is one of that name, it gets the name ``new``.

    All that is in it gets the mode that the umask gives to new files and folders. Every byte is on the disk before the
    name is. On Linux the two names are exchanged in one step. Elsewhere there is a moment in which the old folder has
    the name ``NAME.old-PID`` and ``folder`` is missing.
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

    Some libraries write through temporary files that only their owner can read; safetensors is one of them. Links are
    left alone.
    """
    probe = folder / f".mode-{os.getpid()}"  # the umask itself can only be read by changing it for all threads
    probe.mkdir(exist_ok=True)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in paths:
        wanted = mode if path.is_dir() else mode & 0o666
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != wanted:
            path.chmod(wanted)


def write_whole(file: Path, text: str) -> None:
    """Write a file that has the old text or the new one, whenever the process or the machine stops."""
    new = file.with_name(f"{file.name}.new-{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    new.replace(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return whether the system could."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    done: int = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0
