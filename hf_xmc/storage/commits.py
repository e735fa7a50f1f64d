"""One commit on the Hub, upon the one that was there: all of it, or nothing."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, metadata_load, metadata_save


class Repository(NamedTuple):
    """A repository as it was at one commit."""

    api: HfApi
    repo_id: str
    repo_type: str
    revision: str | None
    commit: str
    files: frozenset[str]

    def replace(
        self, folder: Path, names: Iterable[str], *, without: Iterable[str], message: str, create_pr: bool = False
    ) -> str:
        """Commit these files of a folder, and remove those ``without``; the address of the commit or pull request.

        It fails if there was another commit meanwhile.
        """
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        removed = [CommitOperationDelete(path_in_repo=name) for name in without]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # a table of ours
            commit = self.api.create_commit(
                self.repo_id,
                [*added, *removed],
                commit_message=message,
                repo_type=self.repo_type,
                revision=self.revision,
                create_pr=create_pr,
                parent_commit=self.commit,
            )
        return commit.pr_url or str(commit.commit_url)

    def write_card(self, path: Path, **metadata: Any) -> None:
        """The card that is there, or an empty one, with these metadata; what tells of its tables is left out."""
        if path.name in self.files:
            there = self.api.hf_hub_download(
                self.repo_id, path.name, repo_type=self.repo_type, revision=self.commit, local_dir=path.parent / "card"
            )
            shutil.move(there, path)
            shutil.rmtree(path.parent / "card")
        else:
            path.write_text(f"# {self.repo_id.rsplit('/', maxsplit=1)[-1]}\n", encoding="utf-8")
        old = {name: value for name, value in (metadata_load(path) or {}).items() if name != "dataset_info"}
        metadata_save(path, {**old, **metadata})


@contextmanager
def upon(
    repo_id: str,
    repo_type: str = "model",
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Iterator[Repository]:
    """Yield the repository as it is now, created if it does not exist, to commit to within the block.

    Args:
        repo_id: ``org/name``.
        repo_type: ``"model"`` or ``"dataset"``.
        private: who may see a repository that is made.
        revision: a branch, which is created if it does not exist.
        token: as everywhere on the Hub.

    Raises:
        RuntimeError: if anything fails in the block. The repository then holds the old content, or all of the new one.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        there = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        files = frozenset(api.list_repo_files(repo_id, repo_type=repo_type, revision=there.sha))
        yield Repository(api, repo_id, repo_type, revision, str(there.sha), files)
    except Exception as error:  # whatever its HTTP library raises: which one that is changes with its version
        raise RuntimeError(
            f"the push to {repo_id} failed ({type(error).__name__}: {error}). The commit is made whole or not at all, "
            "and what is here is untouched: push again."
        ) from error
