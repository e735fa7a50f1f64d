"""``xmc_config.json``: all files of a saved model, so that only files that were saved together are loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils.versions import require_version

from hf_xmc.data.columns import check_is_list
from hf_xmc.hub.backends import MAIN, TORCH, backend_of, read_by
from hf_xmc.storage.folders import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """The names of the files of a release, besides those of the encoder."""

    card: str = "README.md"
    config: str = "xmc_config.json"  # written last: a folder without it is incomplete
    label_index: str = "label_index"
    labels: str = "label_index/labels.parquet"
    label_embeddings: str = "label_index/embeddings.safetensors"  # with the label vectors, if there are any
    label_vectors: str = "label_index/label_vectors.safetensors"  # if the model has them
    faiss: str = "label_index/faiss.safetensors"  # rebuilt from the embeddings if missing or modified
    training_memory: str = "training_memory"
    memory_embeddings: str = "training_memory/embeddings.safetensors"
    memory_texts: str = "training_memory/texts.parquet"
    memory_faiss: str = "training_memory/faiss.safetensors"  # likewise
    calibration: str = "calibration.json"
    new_labels: str = "new_labels"
    new_label_words: str = "new_labels/words.parquet"
    new_label_map: str = "new_labels/probabilities.json"


LAYOUT = Layout()
REBUILT = {LAYOUT.faiss, LAYOUT.memory_faiss}  # files that need not be there
# The parts that a model may have in addition to the encoder, and the file or folder of each.
PARTS = {
    "label_index": LAYOUT.label_index,
    "training_memory": LAYOUT.training_memory,
    "calibration": LAYOUT.calibration,
    "new_labels": LAYOUT.new_labels,
}
FORMAT_VERSION = 1
REQUIRES = ["sentence-transformers>=6.2"]  # to read the encoder
LOADED = {".json", ".txt", ".safetensors", ".model", ".parquet", ".jinja"}  # suffixes, but for other backends
ENDPOINT = {"handler.py", "requirements.txt"}  # of an Inference Endpoint, in the root; they belong to no release
REFUSED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".py", ".so", ".faiss"}


def write(folder: Path, parts: Mapping[str, Mapping[str, Any]], **about: Any) -> None:
    """Describe all files of a folder.

    Args:
        folder: A folder that holds all files of the release.
        parts: The metadata of each part other than the encoder, by its file or folder.
        about: Other metadata.
    """
    files = {name: identity(folder / name) for name in files_of(folder)}
    about = {
        "format_version": FORMAT_VERSION,
        "requires": REQUIRES,
        **about,
        "parts": dict(parts),
        "encoder_fingerprint": fingerprint_of(files),
        "files": files,
    }
    rewrite(folder, about)


def rewrite(folder: Path, about: Mapping[str, Any]) -> None:
    """Write a manifest with its digest, in place of the one that a folder may hold."""
    write_atomically(folder / LAYOUT.config, json.dumps({**about, "digest": digest_of(about)}, indent=2))


def read(path: Path) -> dict[str, Any]:
    """Return the manifest in a file, after checking that it names only files in its own folder, and no code.

    Raises:
        ValueError: if the manifest has another format, or is damaged or malicious.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, files, parts = about.get("format_version"), about.get("files"), about.get("parts")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a manifest ({error}): get the model again (from the Hub: `force_download=True`)."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version!r}; this version of hf_xmc reads format {FORMAT_VERSION}.")
    if not isinstance(files, dict) or not isinstance(parts, dict) or "modules.json" not in files:
        raise ValueError(f"{path} must name parts, and files with modules.json among them: the model is incomplete.")
    if about.get("digest") != digest_of(about):
        raise ValueError(
            f"{path} is not the file that was saved: get the model again (from the Hub: `force_download=True`)."
        )
    if unknown := sorted(set(parts) - set(PARTS.values())):
        raise ValueError(f"{path} holds {', '.join(unknown)}, which this version does not know: update hf_xmc.")
    for name in files:
        names = PurePosixPath(name).parts
        if "\\" in name or ":" in name or not names or names[0] == "/" or ".." in names or str(Path(*names)) != name:
            raise ValueError(f"{path} names {name!r}, which is not a file in the folder of the model.")
        if not belongs(name):
            raise ValueError(
                f"{path} names {name!r}: a release holds {', '.join(sorted(LOADED))} and nothing else, except files of "
                "other backends in onnx/ and openvino/."
            )
        if is_adapter(name):
            raise ValueError(
                f"{path} names {name!r}: an adapter does not load without its base model, which the release does not "
                "hold. Load the adapter with its base model, and save the model again: this merges them."
            )
    for part in parts:
        if not files_of_part(files, part):
            raise ValueError(f"{path} names no file of {part}: the model is incomplete.")
    if about.get("encoder_fingerprint") != fingerprint_of(files):
        raise ValueError(f"{path}: the encoder is not the one that made the label embeddings.")
    return dict(about)


def checked_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the files or folders of parts.

    Raises:
        ValueError: if a part is unknown, or is given without the label index that it needs.

    >>> checked_parts(["label_index", "calibration"])
    ('label_index', 'calibration.json')
    """
    check_is_list("`parts` to be a list of names", parts)
    names = list(parts)
    for name in names:
        if name not in PARTS:
            raise ValueError(f"`parts` must hold names out of {', '.join(PARTS)}, got {name!r}.")
    if names and "label_index" not in names:
        raise ValueError(f"`parts` must hold 'label_index' too, which {names[0]} needs, got {names}.")
    return tuple(PARTS[name] for name in names)


def available_parts(about: Mapping[str, Any], parts: Collection[str] | None, name: str) -> tuple[str, ...]:
    """Return the parts of a release that are wanted.

    Args:
        about: The manifest.
        parts: The wanted parts, as :func:`checked_parts` returns them; ``None`` for all.
        name: The name of the release, for error messages.

    Raises:
        ValueError: if the release does not have a wanted part, or the calibration is wanted without the memory.
    """
    available = tuple(part for part in PARTS.values() if files_of_part(about["files"], part))
    if parts is None:
        return available
    for missing in (part for part in parts if part not in available):
        raise ValueError(
            f"`parts` names {missing}, which {name} does not have; it has {', '.join(available) or 'none'}."
        )
    if LAYOUT.calibration in parts and LAYOUT.training_memory in set(available) - set(parts):
        raise ValueError(
            f"`parts` must hold 'training_memory' too: the calibration of {name} was fitted to scores with its votes."
        )
    return tuple(parts)


def check(
    folder: Path, about: Mapping[str, Any], parts: Collection[str], *, verify: bool = True, backend: str = TORCH
) -> dict[str, Any]:
    """Return a manifest, after a check that every file of the encoder and of ``parts`` is the one that was saved.

    Without ``verify`` only the sizes of files are compared, which takes no time; otherwise their content is read. Files
    of another backend than ``backend`` are not read, and need not be there. A file of a backend that was added to the
    folder is accepted, with a warning if ``backend`` may read it.

    The ``faiss.safetensors`` of an index can be rebuilt, so it may be missing or modified. It is then left out of the
    result, with a warning.

    Raises:
        ValueError: if a file is missing, modified or was added, or if an installed library is too old.
    """
    try:
        for requirement in about.get("requires", []):
            require_version(requirement, "It is needed to read the model.")
    except (ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / LAYOUT.config}: {error}") from None
    files, changed = about["files"], set()
    for part in (None, *parts):
        for name in read_by(backend, files_of_part(files, part)):
            path = folder / name
            if path.is_file() and _is_saved(path, files[name], verify):
                continue
            wrong = f"{path} is {'not the file that was saved' if path.exists() else 'missing'}"
            if name not in REBUILT:
                raise ValueError(
                    f"{wrong}: get the model again (from the Hub: `force_download=True`), or, if the encoder was "
                    "changed on purpose, build its label index again with `hf-xmc index`."
                )
            logger.warning("%s: the index is rebuilt from the embeddings.", wrong)
            changed.add(name)
    for name in files_of(folder):
        if name in {*files, *ENDPOINT}:
            continue
        if backend != TORCH and backend_of(name) == backend:
            logger.warning("%s was added to the model: it is not compared with anything.", folder / name)
        elif backend_of(name) is None and PurePosixPath(name).suffix in {*LOADED, *REFUSED, MAIN.get(backend)}:
            raise ValueError(f"{folder / name} was not saved with the model, but a loader might read it: remove it.")
    return {**about, "files": {name: entry for name, entry in files.items() if name not in changed}}


def files_of_part(files: Iterable[str], part: str | None) -> list[str]:
    """Return the files of a part; ``None`` is the encoder."""
    owners = set(PARTS.values())
    owner = {name: first if (first := name.split("/")[0]) in owners else None for name in files}
    return [name for name in files if owner[name] == part]


def belongs(name: str) -> bool:
    """Return whether a release may hold a file of this name."""
    return PurePosixPath(name).suffix in LOADED or backend_of(name) is not None


def is_adapter(name: str) -> bool:
    """Return whether a file describes an adapter, whose base model is not in the folder."""
    return PurePosixPath(name).name == "adapter_config.json"


def digest_of(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own ``digest``."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def fingerprint_of(files: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the files that embeddings depend on."""
    encoder = {name: files[name] for name in files_of_part(files, None)}
    return hashlib.sha256(json.dumps(encoder, sort_keys=True).encode()).hexdigest()


def files_of(folder: Path) -> list[str]:
    """Return all files of a folder that a manifest lists."""
    # People may edit the card, and hidden files belong to the Hub. Links are not followed: the Hub's cache holds links.
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name not in (LAYOUT.card, LAYOUT.config) and not name.startswith(".")]


def _is_saved(path: Path, entry: Any, verify: bool) -> bool:
    if verify:
        return bool(identity(path) == entry)
    return isinstance(entry, dict) and entry.get("size") == path.stat().st_size


def identity(path: Path) -> dict[str, str | int]:
    """Return the SHA-256 and the size of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}
