"""Releases on the Hub: each push is one commit that holds a complete model, and one commit is read."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from hf_xmc.hub import manifest
from hf_xmc.hub.backends import TORCH, Loading, read_by
from hf_xmc.hub.manifest import ENDPOINT, LAYOUT, REBUILT, files_of_part
from hf_xmc.storage.commits import commit_to
from hf_xmc.storage.snapshots import DownloadSettings, Snapshot

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The paper's checkpoints: DistilBERT, pooled at [CLS]. Some were trained on cosines, the others on free norms.
PUBLISHED = re.compile(r"quicktensor/dexml_([\w.-]+)", re.IGNORECASE)
MODEL = "model"  # folder of the saved model in the output_dir of a training
PUBLISHED_NORMALISED = {"eurlex-4k", "lf-amazontitles-131k"}


class Checked(NamedTuple):
    """A release on this machine whose wanted files have been checked."""

    folder: Path
    parts: tuple[str, ...]  # the wanted parts in addition to the encoder, each by its file or folder
    about: Mapping[str, Any]  # its manifest, without a file that must be rebuilt


class PushSettings(TypedDict, total=False):
    """The settings of a push, see :func:`push`."""

    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str
    token: str | bool | None


def source(name: str | Path, **settings: Unpack[DownloadSettings]) -> Path | Snapshot:
    """Return the place to read a model from: a folder, or a repository of the Hub with the settings of a ``Snapshot``.

    The ``output_dir`` of ``hf_xmc.train`` stands for the folder ``model`` in it.

    Raises:
        FileNotFoundError: if it is neither, or an ``output_dir`` has no model yet.
        TypeError: if a setting is unknown.
        ValueError: if a revision is given for a folder.
    """
    for setting in settings:
        if setting not in DownloadSettings.__annotations__:
            raise TypeError(
                f"{setting!r} is not a setting; expected one of {', '.join(DownloadSettings.__annotations__)}."
            )
    if Path(name).is_dir():
        if (revision := settings.get("revision")) is not None:
            raise ValueError(f"`revision` must be None for a folder, got {revision!r}: {name} has one version.")
        return _model_in(Path(name))
    if not (isinstance(name, str) and REPO_ID.fullmatch(name)):
        raise FileNotFoundError(f"{name} is not a folder.")
    home = os.getenv("SENTENCE_TRANSFORMERS_HOME")  # the cache of sentence-transformers
    settings["cache_dir"] = settings.get("cache_dir") or home
    return Snapshot(name, **settings)


def _model_in(folder: Path) -> Path:
    """Return a folder, or the ``model`` in it if it is the ``output_dir`` of a training."""
    if any((folder / name).exists() for name in (LAYOUT.config, "modules.json", "config.json")):
        return folder
    if (folder / MODEL).is_dir():
        return folder / MODEL
    if checkpoints := sorted((path.name for path in folder.glob("checkpoint-*") if path.is_dir()), key=_natural):
        raise FileNotFoundError(
            f"{folder} has no model, only {', '.join(checkpoints)} of a training that has not saved one. Continue the "
            "training, save the model with `save_pretrained`, or load a checkpoint with its labels: "
            f"`XMCModel.from_pretrained({str(folder / checkpoints[-1])!r}, labels=[...])`."
        )
    return folder


def _natural(name: str) -> tuple[int, str]:
    """Return the key that sorts ``checkpoint-9`` before ``checkpoint-10``."""
    return len(name), name


def find(
    name: str | Path | Snapshot,
    *,
    parts: Iterable[str] | None = None,
    verify: bool = True,
    backend: str = TORCH,
    **settings: Unpack[DownloadSettings],
) -> Checked | None:
    """Download the wanted files of a release if it is on the Hub, and check them.

    Args:
        name: A folder, ``org/name``, or a :func:`source`.
        parts: Names of the wanted parts in addition to the encoder, out of ``label_index``, ``training_memory`` and
            ``calibration``. ``None`` stands for all parts of the release, ``()`` for the encoder alone.
        verify: Whether to compare the content of each file with the one that was saved, and not its size alone.
        backend: Backend of the encoder. Files of others are neither downloaded nor checked.
        settings: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``, as in
            :class:`hf_xmc.storage.snapshots.Snapshot`.

    Returns ``None`` for a model that is not a release and holds no part of one.

    Raises:
        FileNotFoundError: if ``name`` is neither a folder nor the name of a repository.
        ValueError: if a part is unknown, missing, or wanted without a part that it needs; if the repository or the
            revision does not exist; if the release is incomplete or modified; or if a wanted file can neither be
            downloaded nor be found in the cache.
    """
    wanted = None if parts is None else manifest.checked_parts(parts)
    place = name if isinstance(name, Snapshot) else source(name, **settings)
    folder = place if isinstance(place, Path) else place.download([LAYOUT.config, LAYOUT.card])
    if not (folder / LAYOUT.config).exists():
        _check_is_plain(place, wanted)
        return None
    about = manifest.read(folder / LAYOUT.config)
    chosen = manifest.available_parts(about, wanted, str(place))
    if isinstance(place, Snapshot):
        files = read_by(backend, [file for part in (None, *chosen) for file in files_of_part(about["files"], part)])
        folder = place.download(files)
        place.check_known(file for file in files if file not in REBUILT)
    return Checked(folder, chosen, manifest.check(folder, about, chosen, verify=verify, backend=backend))


def _check_is_plain(place: Path | Snapshot, wanted: Collection[str] | None) -> None:
    """Raise if a model without a manifest is an incomplete release, or if parts of it are wanted.

    If the Hub does not answer and the cache does not tell whether the model is a release, only the encoder may be read,
    with a warning.
    """
    if isinstance(place, Path):
        has_index = (place / LAYOUT.label_index).exists()
    else:
        try:
            place.check_known([LAYOUT.config])
        except ValueError as error:
            if wanted != ():
                raise
            logger.warning("%s The encoder is loaded unchecked.", error)
            return
        has_index = any(file.startswith(f"{LAYOUT.label_index}/") for file in place.files or ())
    if has_index:
        raise ValueError(
            f"{place} has a {LAYOUT.label_index} but no {LAYOUT.config}: it was not saved, or not uploaded, to the end."
        )
    if wanted:
        raise ValueError(f"`parts` must be () or None for {place}, an encoder without any part, got {list(wanted)}.")


def plain_encoder(place: Path | Snapshot, loading: Loading | None = None) -> SentenceTransformer:
    """Return a sentence-transformers model of a folder or of the Hub that is not a release.

    The checkpoints of the paper, ``quicktensor/dexml_{eurlex-4k, lf-amazontitles-131k, lf-wikipedia-500k,
    lf-amazontitles-1.3m}``, get the pooling and normalisation they were trained with, even if their repository says
    otherwise: [CLS], and unit norm for the first two.

    Raises:
        ValueError: if the model does not load, or not like this, or if the Hub does not answer and a file is not in the
            cache.
    """
    loading = loading or Loading()
    name, settings, folder = str(place), dict[str, Any](), place if isinstance(place, Path) else None
    if isinstance(place, Snapshot):
        folder = place.download(["modules.json"])
        if place.force_download:  # sentence-transformers has no such setting
            place.download(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        place.check_known(_read_by_stock_code(folder))
        name, settings = (
            place.name,
            {
                "revision": place.commit,
                "token": place.token,
                "cache_folder": None if place.cache_dir is None else str(place.cache_dir),
                "local_files_only": place.silence is not None,
            },
        )
    published = PUBLISHED.fullmatch(name)
    if isinstance(place, Path):
        loading.check_fits(place, place, [path.relative_to(place).as_posix() for path in place.rglob("*")])
    else:
        loading.check_fits(name, place.download(["modules.json"]), place.files or ())
    if published and loading.backend != TORCH:
        raise ValueError(f"`backend` must be 'torch' for {name}, got {loading.backend!r}: its pooling is set here.")
    try:
        encoder = loading.load(name, **settings)
    except Exception as error:  # its loaders raise many exception types
        raise ValueError(
            f"{place} has no {LAYOUT.config}, and does not load as a model of sentence-transformers either ({error}). "
            "If a file in the cache is damaged, `force_download=True` gets it again."
        ) from error
    if not published:
        return encoder
    transformer: Any = encoder[0]
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")]
    if published[1].lower() in PUBLISHED_NORMALISED:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, similarity_fn_name="dot", device=loading.device)


def _read_by_stock_code(folder: Path) -> Iterator[str]:
    """Yield the files whose absence from the cache sentence-transformers would not notice."""
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
    """Publish a saved release in one commit, whose parent is the newest commit at the start of the push.

    Args:
        folder: Folder of the release.
        repo_id: Name of the repository, ``org/name``, which is created if it does not exist.
        private: Whether a new repository is private; by default as the organization is set up.
        revision: Branch to commit to, which is created if it does not exist; by default ``main``.
        create_pr: Whether to open a pull request instead.
        commit_message: First line of the commit message.
        token: Token of an account; by default the one that is logged in.

    Returns the address of the commit, or of the pull request.

    Raises:
        RuntimeError: if the push fails. The repository then holds the complete old release, or the complete new one.
            The folder is unchanged, and the push can be repeated.
    """
    names = [LAYOUT.config, *manifest.read(folder / LAYOUT.config)["files"]]
    names += [LAYOUT.card] if (folder / LAYOUT.card).exists() else []
    with commit_to(repo_id, private=private, revision=revision, token=token) as there:
        # Files of an old release, such as the weights of another architecture, would mix with the new one.
        others = there.files - {*names, *ENDPOINT, LAYOUT.card}
        stale = [name for name in others if not name.startswith(".") and not name.endswith(".whl")]
        return there.replace(folder, names, without=stale, message=commit_message, create_pr=create_pr)
