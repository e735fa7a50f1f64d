"""Push to the Hub in a single commit, which replaces a known previous commit or fails."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, metadata_load, metadata_save
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError


class Repository(NamedTuple):
    """A repository at one commit."""

    api: HfApi
    repo_id: str
    repo_type: str
    revision: str | None
    commit: str
    files: frozenset[str]

    def replace(
        self, folder: Path, names: Iterable[str], *, without: Iterable[str], message: str, create_pr: bool = False
    ) -> str:
        """Commit files and deletions, and return the URL of the commit or of the pull request.

        The commit fails if the repository has changed since :func:`commit_to` read it.

        Args:
            folder: Folder of the files to commit.
            names: Names of the files, relative to the folder.
            without: Names of files to delete from the repository.
            message: Commit message.
            create_pr: Whether to open a pull request instead of committing to the branch.
        """
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        removed = [CommitOperationDelete(path_in_repo=name) for name in without]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # intended
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

    def read(self, name: str, folder: Path) -> Path:
        """Download a file into a folder, and return its path."""
        with TemporaryDirectory(dir=folder) as there:
            found = self.api.hf_hub_download(
                self.repo_id, name, repo_type=self.repo_type, revision=self.commit, local_dir=there
            )
            return Path(shutil.move(found, folder / Path(name).name))

    def metadata(self, card: str) -> dict[str, Any]:
        """Return the metadata of a card; none if the repository does not have it."""
        if card not in self.files:
            return {}
        with TemporaryDirectory() as folder:
            return metadata_load(self.read(card, Path(folder))) or {}

    def write_card(self, path: Path, **metadata: Any) -> None:
        """Write the existing card, or an empty one, with updated metadata and without ``dataset_info``."""
        if path.name in self.files:
            self.read(path.name, path.parent)
        else:
            path.write_text(f"# {self.repo_id.rsplit('/', maxsplit=1)[-1]}\n", encoding="utf-8")
        old = {name: value for name, value in (metadata_load(path) or {}).items() if name != "dataset_info"}
        metadata_save(path, {**old, **metadata})


def check_token(repo_id: str, token: str | bool | None = None) -> None:
    """Check that there is a token to push with, and that the Hub knows it.

    Raises:
        ValueError: if there is no token.
        RuntimeError: if the Hub refuses it, or does not answer.
    """
    try:
        if token is False:
            raise LocalTokenNotFoundError
        HfApi(token=token).whoami()
    except LocalTokenNotFoundError:
        raise ValueError(
            f"a push to {repo_id} needs a token, and none was found. Log in with `hf auth login`, set HF_TOKEN, or "
            "pass `token`."
        ) from None
    except Exception as error:  # as in `commit_to`
        raise _not_read(repo_id, error) from error


def find_repository(repo_id: str, repo_type: str, token: str | bool | None = None) -> Repository | None:
    """Return the newest state of a repository, or ``None`` if the token does not see it. Nothing is changed.

    Raises:
        RuntimeError: if the Hub does not answer.
    """
    api = HfApi(token=token)
    try:
        found = api.repo_info(repo_id, repo_type=repo_type)
        files = frozenset(api.list_repo_files(repo_id, repo_type=repo_type, revision=found.sha))
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # as in `commit_to`
        raise _not_read(repo_id, error) from error
    return Repository(api, repo_id, repo_type, None, str(found.sha), files)


def _not_read(repo_id: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"the push to {repo_id} has not begun: the Hub did not answer ({type(error).__name__}: {error}). Nothing was "
        "changed. Push again."
    )


@contextmanager
def commit_to(
    repo_id: str,
    repo_type: str = "model",
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    space_sdk: str | None = None,
) -> Iterator[Repository]:
    """Yield the current state of a repository, to commit to within the block. Create it if it does not exist.

    Args:
        repo_id: Repository, ``org/name``.
        repo_type: ``"model"``, ``"dataset"`` or ``"space"``.
        private: Whether a new repository is private; by default the organization decides.
        revision: Branch to commit to, which is created if it does not exist.
        token: Access token of the Hub; by default the stored one.
        space_sdk: How a new Space runs, such as ``"gradio"``.

    Raises:
        RuntimeError: if anything fails in the block. The repository then has either its old content or the complete new
            content.
    """
    api = HfApi(token=token)
    try:
        created = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk)
        repo_id = created.repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        found = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        files = frozenset(api.list_repo_files(repo_id, repo_type=repo_type, revision=found.sha))
        yield Repository(api, repo_id, repo_type, revision, str(found.sha), files)
    except Exception as error:  # the HTTP library, and so the exception types, depend on the version of huggingface_hub
        raise RuntimeError(
            f"the push to {repo_id} failed ({type(error).__name__}: {error}). The commit is atomic, and local files "
            "are unchanged. Push again."
        ) from error
