"""Releases on the Hub: one commit puts a model there whole, and one commit is what is read."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from hf_xmc import manifest
from hf_xmc.commits import upon
from hf_xmc.manifest import CONFIG, LABEL_INDEX, PARTS, REBUILT, files_of_part

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The paper's checkpoints: DistilBERT, pooled at [CLS]. Some were trained on cosines, the others on free norms.
PUBLISHED = re.compile(r"quicktensor/dexml_([\w.-]+)", re.IGNORECASE)
PUBLISHED_NORMALISED = {"eurlex-4k", "lf-amazontitles-131k"}


def find(
    name: str | Path,
    *,
    parts: Collection[str] = PARTS,
    allow_patterns: str | list[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """The folder of a release: one here, or one downloaded into the Hub's cache, by its manifest.

    Args:
        name: a folder, or ``org/name``.
        parts: which parts of it are downloaded beside the encoder.
        allow_patterns: of these, the ones that :func:`allowed` leaves.
        revision, token, cache_dir, local_files_only: as everywhere on the Hub. Offline, or with ``local_files_only``,
            what was downloaded before is found.

    Returns ``None`` where there is no release, and no part of one.

    Raises:
        FileNotFoundError: a path that leads nowhere.
        ValueError: no such repository or revision, or it holds a release in part.
    """
    here = Path(name)
    if here.is_dir():
        return _whole(here, str(here), (here / LABEL_INDEX).exists())
    if not (isinstance(name, str) and REPO_ID.fullmatch(name)):
        raise FileNotFoundError(f"{name} is no folder.")
    download = partial(snapshot_download, name, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    at = f" at revision {revision}" if revision else ""
    try:
        folder = Path(download(revision=revision, allow_patterns=[CONFIG, "README.md"]))
    except RepositoryNotFoundError:
        raise ValueError(f"{name!r} is neither a folder here nor a model of the Hub (is it private?).") from None
    except RevisionNotFoundError:
        raise ValueError(
            f"{name} has no revision {revision!r}; expected a branch, a tag or a commit of it, or none for the newest."
        ) from None
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{name}{at} is not in the local cache, and the Hub was not reached ({error}).") from None
    if not (folder / CONFIG).exists():
        return _whole(folder, name + at, not local_files_only and _holds_part_of_one(name, folder.name, token))
    files, parts = manifest.read(folder / CONFIG)["files"], allowed(folder, parts, allow_patterns)
    wanted = [file for part in (None, *parts) for file in files_of_part(files, part)]
    if REBUILT in wanted and not _matching([REBUILT], allow_patterns):
        wanted.remove(REBUILT)
    # By the commit that the manifest came from: a push in between changes nothing.
    return Path(download(revision=folder.name, allow_patterns=[CONFIG, "README.md", *wanted]))


def allowed(folder: Path, parts: Collection[str], allow_patterns: str | list[str] | None) -> Collection[str]:
    """The parts of a release that ``allow_patterns`` leave: those whose files, as the manifest names them, all match
    one; and none without the label index, which the others are about."""
    if allow_patterns is None:
        return parts
    files = manifest.read(folder / CONFIG)["files"]
    taken = _matching(files, allow_patterns) | {REBUILT}
    left = tuple(part for part in parts if taken.issuperset(files_of_part(files, part)))
    return left if LABEL_INDEX in left else ()


def _matching(files: Collection[str], allow_patterns: str | list[str] | None) -> set[str]:
    return set(filter_repo_objects(files, allow_patterns=allow_patterns))


def _whole(folder: Path, name: str, has_index: bool) -> Path | None:
    if (folder / CONFIG).exists():
        return folder
    if has_index:
        raise ValueError(f"{name} has a {LABEL_INDEX} and no {CONFIG}: it was not saved, or not uploaded, to the end.")
    return None


def _holds_part_of_one(repo_id: str, revision: str, token: str | bool | None) -> bool:
    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except OfflineModeIsEnabled:
        return False
    return any(name.startswith(f"{LABEL_INDEX}/") for name in names)


def plain_encoder(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: str | None = None,
) -> SentenceTransformer:
    """A sentence-transformers model of a folder or of the Hub, without parts of ours.

    The checkpoints of the paper, ``quicktensor/dexml_{eurlex-4k, lf-amazontitles-131k, lf-wikipedia-500k,
    lf-amazontitles-1.3m}``, get the pooling and normalisation they were trained with, whatever their repository says:
    [CLS], and unit norm for the first two.

    Raises:
        ValueError: it does not load.
    """
    try:
        encoder = SentenceTransformer(
            name,
            revision=revision,
            token=token,
            cache_folder=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            device=device,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} has no {CONFIG}, and does not load as a model of sentence-transformers either ({error})."
        ) from error
    if not (published := PUBLISHED.fullmatch(name)):
        return encoder
    transformer: Any = encoder[0]
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")]
    if published[1].lower() in PUBLISHED_NORMALISED:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, similarity_fn_name="dot", device=device)


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
    names = [CONFIG, *manifest.read(folder / CONFIG)["files"]]
    names += ["README.md"] if (folder / "README.md").exists() else []
    with upon(repo_id, private=private, revision=revision, token=token) as there:
        # Files of the release before, such as the weights of another architecture, would mix with the new one.
        stale = [name for name in there.files - set(names) if not name.startswith(".") and name != "README.md"]
        return there.replace(folder, names, without=stale, message=commit_message, create_pr=create_pr)
