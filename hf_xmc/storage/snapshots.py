"""One commit of a repository of the Hub, read from there, or from the cache if the Hub does not answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

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
Failure = (httpx.HTTPError, OSError)  # of a request, or of the cache
KINDS = {"model": "model", "dataset": "data set"}


class Snapshot:
    """A repository of the Hub at one commit.

    A commit never changes, so what is cached of it is used without a request. Whether a branch or a tag has moved is
    asked in one request that is not repeated; if the Hub does not answer, the commit that the cache knows is used, and
    only the cache is read from then on.

    Args:
        name: ``org/name``.
        repo_type: ``"model"`` or ``"dataset"``.
        revision: a branch, a tag or a commit; by default the newest commit of ``main``.
        token: of an account; by default the one that is logged in.
        cache_dir: by default the Hub's cache.
        local_files_only: ask the Hub nothing.
        force_download: download again what is cached.

    Raises:
        ValueError: if ``force_download`` and ``local_files_only`` are both given, or the name can be no repository.
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
            raise ValueError("`force_download` downloads and `local_files_only` forbids it: leave one of them out.")
        self.name = name
        self.repo_type = repo_type
        self.token = token
        self.cache_dir = cache_dir
        self.local_files_only = local_files_only
        self.force_download = force_download
        self.commit = revision if revision and COMMIT.fullmatch(revision) else None  # else known once something is read
        self._revision = revision
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{self._nowhere} in reach ({error}).") from None

    def __str__(self) -> str:
        return f"{self.name} at revision {self._revision}" if self._revision else self.name

    @cached_property
    def silence(self) -> Exception | None:
        """Why the Hub does not answer, or ``None`` if it does.

        Raises:
            ValueError: if it answers that there is no such revision.
        """
        if self.local_files_only:
            return OfflineModeIsEnabled("local_files_only=True")
        try:
            HfApi(token=self.token).repo_info(
                self.name, repo_type=self.repo_type, revision=self.commit or self._revision
            )
        except RevisionNotFoundError:
            raise ValueError(
                f"{self.name} has no revision {self._revision!r}; expected a branch, a tag or a commit of it, or none "
                "for the newest."
            ) from None
        except Failure as error:
            return error
        return None

    @property
    def files(self) -> frozenset[str] | None:
        """The names of all files of the commit; ``None`` if neither the cache nor the Hub tells them.

        Raises:
            ValueError: if the Hub stops to answer.
        """
        files = self._cached_list()
        if files is not None or self.silence:
            return files
        try:  # a cache that cannot be written keeps no list
            return frozenset(
                HfApi(token=self.token).list_repo_files(self.name, repo_type=self.repo_type, revision=self.commit)
            )
        except Failure as error:
            raise self._not_read(error) from error

    def download(self, names: Iterable[str]) -> Path:
        """Return the folder of the commit in the cache, with those of these files that the repository has.

        If the Hub does not answer and the cache has no list of the repository's files, some may be missing.

        Raises:
            ValueError: if the repository, the revision or a file cannot be found or downloaded.
        """
        get = partial(snapshot_download, allow_patterns=list(names), **self._place)
        if self.commit and not self.force_download and self._cached_list() is not None:
            with suppress(LocalEntryNotFoundError):
                return Path(get(revision=self.commit, local_files_only=True))
        silence, revision = self.silence, self.commit or self._revision
        if silence and self.force_download:
            raise ValueError(f"{self} cannot be downloaded again: the Hub did not give it ({silence}).") from silence
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
            logger.warning("%s: the Hub did not give it (%s); what is cached is used.", self, silence)
        self.commit = Path(found).name
        return Path(found)

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` if the Hub does not answer, and the cache does not tell of one of these files.

        The cache tells of a file if it holds it, or knows that the repository does not have it.
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
                f"{self} is gated: ask for access on its page, and pass the `token` of an account with it ({error})."
            )
        if file is None and isinstance(error, RepositoryNotFoundError):
            return ValueError(f"{self._nowhere} (is it private? Then pass `token`).")
        if self.silence is None:
            return ValueError(f"{self} could not be downloaded ({type(error).__name__}: {error}).")
        what = f"{file} of " if file else ""
        if not (file or self.commit) and self._cached_list() is None:  # the name may be that of a folder, misspelt
            what = f"{self._nowhere} in reach: "
        return ValueError(
            f"{what}{self} is not in the local cache, and the Hub did not give it ({error}). "
            "Download it while the Hub can be reached."
        )
