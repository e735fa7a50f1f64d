"""A folder is replaced in one step: synced before it gets its name, through links, and never the current one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_xmc.storage import folders


def test_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    """A power cut keeps only synced data: every file and folder first, then the rename, then the parent."""
    synced, renamed = [], []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    stock = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (renamed.append(list(synced)), stock(self, to))[1])
    with folders.atomic_folder(tmp_path / "a") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("x")
        inodes = {path.stat().st_ino for path in [new, new / "inner", new / "inner" / "file"]}
    assert inodes <= set(renamed[0])
    assert synced[-1] == tmp_path.stat().st_ino


def test_folder_is_replaced_when_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        with folders.atomic_folder(tmp_path / "a") as new:
            (new / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]


@pytest.mark.parametrize("there", [True, False])
def test_symbolic_link_stays_and_its_target_is_replaced(there, tmp_path):
    (tmp_path / "link").symlink_to("disk/a")
    if there:
        (tmp_path / "disk" / "a").mkdir(parents=True)
        (tmp_path / "disk" / "a" / "old").touch()
    with folders.atomic_folder(tmp_path / "link") as new:
        (new / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "disk", "disk/a", "disk/a/new", "link",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [".", "..", "../a"])
def test_current_directory_is_not_replaced(name, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(ValueError, match="contains the current directory"), folders.atomic_folder(Path(name)):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_failed_exchange_returns_false(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    assert not folders._exchange(tmp_path / "a", tmp_path / "missing")
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(folders, "os", SimpleNamespace(name="nt"))  # Windows has no such call to ask for
    assert not folders._exchange(tmp_path / "a", tmp_path / "b")
