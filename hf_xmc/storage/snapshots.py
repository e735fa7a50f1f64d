"""Read a commit of a repository from the Hub, or from the cache if the Hub does not answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    httpx,  # the HTTP library that it uses
    validate_repo_id,
)

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
Failure = (httpx.HTTPError, OSError)  # exceptions of requests and of the cache
KINDS = {"model": "model", "dataset": "data set"}


class DownloadSettings(TypedDict, total=False):
    """The settings of a download, see :class:`Snapshot`."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


class Snapshot:
    """A repository of the Hub at one commit.

    A commit never changes, so its cached files are used without a request. One request, which is not repeated, resolves
    a branch or a tag. If the Hub does not answer it, the cached commit is used, and only the cache is read afterwards.

    Args:
        name: Repository, ``org/name``.
        repo_type: ``"model"`` or ``"dataset"``.
        revision: Branch, tag or commit; by default the newest commit of ``main``.
        token: Access token; by default that of the account that is logged in.
        cache_dir: Cache folder; by default the cache of the Hub client.
        local_files_only: Whether to read only the cache.
        force_download: Whether to download cached files again.

    Raises:
        ValueError: if ``force_download`` and ``local_files_only`` are both given, or if the name is not a valid
            repository name.
    """

    def __init__(
        self,
        name: str,
        *,
        repo_type: str = "model",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        if force_download and local_files_only:
            raise ValueError(
                "`force_download` and `local_files_only` must not be given together. Leave one of them out."
            )
        self.name = name
        self.repo_type = repo_type
        self.token = token
        self.cache_dir = cache_dir
        self.local_files_only = local_files_only
        self.force_download = force_download
        self.commit = revision if revision and COMMIT.fullmatch(revision) else None  # or after the first download
        self._revision = revision
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{self._nowhere} in reach ({error}).") from None

    def __str__(self) -> str:
        return f"{self.name} at revision {self._revision}" if self._revision else self.name

    @cached_property
    def silence(self) -> Exception | None:
        """The error with which the Hub does not answer, or ``None`` if it answers.

        Raises:
            ValueError: if the Hub answers that the revision does not exist.
        """
        if self.local_files_only:
            return OfflineModeIsEnabled("local_files_only=True")
        try:
            HfApi(token=self.token).repo_info(
                self.name, repo_type=self.repo_type, revision=self.commit or self._revision
            )
        except RevisionNotFoundError:
            raise ValueError(
                f"{self.name} has no revision {self._revision!r}; expected a branch, a tag or a commit. Leave it out "
                "for the newest commit."
            ) from None
        except Failure as error:
            return error
        return None

    @property
    def files(self) -> frozenset[str] | None:
        """The names of all files of the commit; ``None`` if neither the cache nor the Hub has the list.

        Raises:
            ValueError: if the Hub stops answering.
        """
        files = self._cached_list()
        if files is not None or self.silence:
            return files
        try:  # a read-only cache has no list
            return frozenset(
                HfApi(token=self.token).list_repo_files(self.name, repo_type=self.repo_type, revision=self.commit)
            )
        except Failure as error:
            raise self._not_read(error) from error

    def download(self, names: Iterable[str]) -> Path:
        """Download files to the cache if necessary, and return the folder of the commit.

        Files that the repository does not have are skipped. Others may be missing, too, if the Hub does not answer and
        the cache has no list of files.

        Raises:
            ValueError: if the repository, the revision or a file cannot be found or downloaded.
        """
        get = partial(snapshot_download, allow_patterns=list(names), **self._place)
        if self.commit and not self.force_download and self._cached_list() is not None:
            with suppress(LocalEntryNotFoundError):
                return Path(get(revision=self.commit, local_files_only=True))
        silence, revision = self.silence, self.commit or self._revision
        if silence and self.force_download:
            raise ValueError(f"{self} cannot be downloaded again: the Hub did not return it ({silence}).") from silence
        try:
            found = get(
                revision=revision,
                token=self.token,
                local_files_only=silence is not None,
                force_download=self.force_download,
            )
        except Failure as error:
            raise self._not_read(silence or error) from error
        if silence and not self.commit and not isinstance(silence, OfflineModeIsEnabled):
            logger.warning("%s: the Hub did not return it (%s). The cached files are used.", self, silence)
        self.commit = Path(found).name
        return Path(found)

    def check_known(self, names: Iterable[str]) -> None:
        """Check that the cache has each file, or knows that the repository lacks it, if the Hub does not answer.

        Raises:
            ValueError: if the Hub does not answer and the cache does not know one of the files.
        """
        listed = self._cached_list()
        for name in names:
            known = try_to_load_from_cache(filename=name, revision=self.commit, **self._place)
            if known is None and (listed is None or name in listed) and self.silence:
                raise self._not_read(self.silence, name)

    @property
    def _place(self) -> dict[str, Any]:
        return {"repo_id": self.name, "repo_type": self.repo_type, "cache_dir": self.cache_dir}

    @property
    def _nowhere(self) -> str:
        return f"{self.name!r} is neither a folder here nor a {KINDS[self.repo_type]} of the Hub"

    def _cached_list(self) -> frozenset[str] | None:
        try:
            tree = get_cached_repo_tree(revision=self.commit or self._revision, **self._place)
        except CachedRepoTreeNotFoundError:
            return None
        return frozenset(file.path for file in tree)

    def _not_read(self, error: Exception, file: str | None = None) -> ValueError:
        if file is None and isinstance(error, GatedRepoError):
            return ValueError(
                f"{self} is gated. Request access on its page, and pass the `token` of such an account ({error})."
            )
        if file is None and isinstance(error, RepositoryNotFoundError):
            return ValueError(f"{self._nowhere}. If it is private, pass `token`.")
        if self.silence is None:
            return ValueError(f"{self} could not be downloaded ({type(error).__name__}: {error}).")
        what = f"{file} of " if file else ""
        if not (file or self.commit) and self._cached_list() is None:  # the name may be a misspelled folder
            what = f"{self._nowhere} in reach: "
        return ValueError(
            f"{what}{self} is not in the local cache, and the Hub did not return it ({error}). "
            "Download it while the Hub can be reached."
        )
