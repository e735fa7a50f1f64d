"""Releases on the Hub: one commit puts a model there whole, and one commit is what is read."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from hf_xmc.hub import manifest
from hf_xmc.hub.manifest import CARD, CONFIG, LABEL_INDEX, PARTS, REBUILT, files_of_part
from hf_xmc.storage.commits import upon
from hf_xmc.storage.snapshots import Snapshot

logger = logging.getLogger(__name__)

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The paper's checkpoints: DistilBERT, pooled at [CLS]. Some were trained on cosines, the others on free norms.
PUBLISHED = re.compile(r"quicktensor/dexml_([\w.-]+)", re.IGNORECASE)
PUBLISHED_NORMALISED = {"eurlex-4k", "lf-amazontitles-131k"}


def source(name: str | Path, **settings: Any) -> Path | Snapshot:
    """Return where a model is read from: a folder, or a repository of the Hub, with the settings of a ``Snapshot``.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: if a revision is given for a folder.
    """
    if Path(name).is_dir():
        if (revision := settings.get("revision")) is not None:
            raise ValueError(f"revision must be None for a folder, got {revision!r}: {name} has one version.")
        return Path(name)
    if not (isinstance(name, str) and REPO_ID.fullmatch(name)):
        raise FileNotFoundError(f"{name} is no folder.")
    home = os.getenv("SENTENCE_TRANSFORMERS_HOME")  # the cache of sentence-transformers
    return Snapshot(name, **{**settings, "cache_dir": settings.get("cache_dir") or home})


def find(
    name: str | Path | Snapshot,
    *,
    parts: Collection[str] = PARTS,
    allow_patterns: str | list[str] | None = None,
    **settings: Any,
) -> Path | None:
    """Return the folder of a release, after those of its files that are wanted are downloaded.

    Args:
        name: a folder, ``org/name``, or a :func:`source`.
        parts: the parts of the release that are wanted in addition to the encoder.
        allow_patterns: of these parts, take those that :func:`allowed` leaves.
        settings: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``, as in
            :class:`hf_xmc.storage.snapshots.Snapshot`.

    Returns ``None`` for a model that is not a release and holds no part of one.

    Raises:
        FileNotFoundError: if ``name`` is neither a folder nor the name of a repository.
        ValueError: if the repository or the revision does not exist, if it holds only a part of a release, or if a
            wanted file can neither be downloaded nor be found in the cache. If the Hub does not answer and the cache
            does not tell whether the model is a release, the encoder alone can be had, with a warning.
    """
    place = name if isinstance(name, Snapshot) else source(name, **settings)
    if isinstance(place, Path):
        return _whole(place, str(place), (place / LABEL_INDEX).exists())
    folder = place.download([CONFIG, CARD])
    if not (folder / CONFIG).exists():
        try:
            place.refuse_unknown([CONFIG])
        except ValueError as error:
            if parts and allow_patterns != []:
                raise
            logger.warning("%s The encoder is loaded unchecked.", error)
            return None
        return _whole(folder, str(place), any(file.startswith(f"{LABEL_INDEX}/") for file in place.files or ()))
    files, parts = manifest.read(folder / CONFIG)["files"], allowed(folder, parts, allow_patterns)
    wanted = [file for part in (None, *parts) for file in files_of_part(files, part)]
    if REBUILT in wanted and not _matching([REBUILT], allow_patterns):
        wanted.remove(REBUILT)
    folder = place.download(wanted)
    place.refuse_unknown(file for file in wanted if file != REBUILT)
    return folder


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


def plain_encoder(place: Path | Snapshot, device: str | None = None) -> SentenceTransformer:
    """Return a sentence-transformers model of a folder or of the Hub, without parts of ours.

    The checkpoints of the paper, ``quicktensor/dexml_{eurlex-4k, lf-amazontitles-131k, lf-wikipedia-500k,
    lf-amazontitles-1.3m}``, get the pooling and normalisation they were trained with, whatever their repository says:
    [CLS], and unit norm for the first two.

    Raises:
        ValueError: if it does not load, or if the Hub does not answer and a file of it is not in the cache.
    """
    name, settings = str(place), dict[str, Any]()
    if isinstance(place, Snapshot):
        folder = place.download(["modules.json"])
        if place.force_download:  # sentence-transformers has no such setting
            place.download(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        place.refuse_unknown(_read_by_stock_code(folder))
        name, settings = (
            place.name,
            {
                "revision": place.commit,
                "token": place.token,
                "cache_folder": None if place.cache_dir is None else str(place.cache_dir),
                "local_files_only": place.silence is not None,
            },
        )
    try:
        encoder = SentenceTransformer(name, device=device, **settings)
    except Exception as error:  # the many errors of its loaders
        raise ValueError(
            f"{place} has no {CONFIG}, and does not load as a model of sentence-transformers either ({error}). If a "
            "file in the cache is damaged, `force_download=True` gets it again."
        ) from error
    if not (published := PUBLISHED.fullmatch(name)):
        return encoder
    transformer: Any = encoder[0]
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")]
    if published[1].lower() in PUBLISHED_NORMALISED:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, similarity_fn_name="dot", device=device)


def _read_by_stock_code(folder: Path) -> Iterator[str]:
    """Yield the files that sentence-transformers would take to be absent if the cache does not hold them."""
    yield "modules.json"
    modules = [{"path": "", "type": "Transformer"}]
    if (folder / "modules.json").exists():
        yield "config_sentence_transformers.json"
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for module in modules:
        if module["type"].endswith("Transformer"):
            names = ["tokenizer_config.json", *(["sentence_bert_config.json"] if len(modules) > 1 else [])]
            yield from ((PurePosixPath(module["path"]) / name).as_posix() for name in names)


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
        RuntimeError: if the push fails. The repository then holds the old release, or all of the new one; the folder is
            untouched, and the push can be repeated.
    """
    names = [CONFIG, *manifest.read(folder / CONFIG)["files"]]
    names += ["README.md"] if (folder / "README.md").exists() else []
    with upon(repo_id, private=private, revision=revision, token=token) as there:
        # Files of the release before, such as the weights of another architecture, would mix with the new one.
        stale = [name for name in there.files - set(names) if not name.startswith(".") and name != "README.md"]
        return there.replace(folder, names, without=stale, message=commit_message, create_pr=create_pr)
