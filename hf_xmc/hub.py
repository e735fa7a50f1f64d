"""Releases on the Hub: one commit puts a model there whole, and one commit is what is read."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from hf_xmc import manifest
from hf_xmc.manifest import CONFIG


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a release into the Hub's cache; its manifest decides which files.

    Returns the folder of the snapshot. Offline, or with ``local_files_only``, what was downloaded before.

    Raises:
        ValueError: no such repository, or it holds no whole release.
    """
    download = partial(snapshot_download, repo_id, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    at = f" at revision {revision}" if revision else ""
    try:
        folder = Path(download(revision=revision, allow_patterns=[CONFIG]))
    except RepositoryNotFoundError:
        raise ValueError(f"{repo_id!r} is neither a folder here nor a model of the Hub (is it private?).") from None
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{repo_id}{at} is not in the local cache, and the Hub was not reached ({error}).") from None
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{repo_id}{at} has no {CONFIG}: it is an encoder without a label index. "
            f"`hf-xmc index {repo_id} --labels LABELS --output_dir FOLDER` makes one, or "
            f'XMCModel(SentenceTransformer("{repo_id}"), labels).'
        )
    files = manifest.read(folder / CONFIG)["files"]
    # By the commit that the manifest came from: a push in between changes nothing.
    return Path(download(revision=folder.name, allow_patterns=[CONFIG, *files]))


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Encoder and label index",
    token: str | bool | None = None,
) -> str:
    """Publish a saved release in one commit, upon the commit that was there when the push began.

    Returns the address of the commit, or of the pull request.

    Raises:
        RuntimeError: the push failed. The repository holds what it held before, or all of the release; the folder is
            untouched, and the push can be repeated.
    """
    api = HfApi(token=token)
    names = [CONFIG, *manifest.read(folder / CONFIG)["files"]]
    names += ["README.md"] if (folder / "README.md").exists() else []
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        old = {file.rfilename for file in there.siblings or []}
        # Files of the release before, such as the weights of another architecture, would mix with the new one.
        stale = [name for name in old - set(names) if not name.startswith(".") and name != "README.md"]
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the label table
            commit = api.create_commit(
                repo_id,
                [*added, *removed],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=there.sha,
            )
        return commit.pr_url or str(commit.commit_url)
    except Exception as error:  # whatever its HTTP library raises: which one that is changes with its version
        raise RuntimeError(
            f"the push to {repo_id} failed ({type(error).__name__}: {error}). The commit is made whole or not at all, "
            "and the model here is untouched: push again."
        ) from error
