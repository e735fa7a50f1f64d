"""``xmc_config.json``: what a saved model consists of, file by file, so that only what was saved together is loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils.versions import require_version

logger = logging.getLogger(__name__)

CARD = "README.md"
CONFIG = "xmc_config.json"  # written last: a folder without it is not a whole model
FORMAT_VERSION = 1
REQUIRES = ["sentence-transformers>=6.2"]  # what reads the encoder
# The parts that a model may have in addition to the encoder, each a file or a folder.
LABEL_INDEX, TRAINING_MEMORY, CALIBRATION = "label_index", "training_memory", "calibration.json"
PARTS = (LABEL_INDEX, TRAINING_MEMORY, CALIBRATION)
REBUILT = "label_index/faiss.safetensors"  # made of the embeddings again where it is not as it was saved
LOADED = {".json", ".txt", ".safetensors", ".model", ".parquet", ".jinja"}  # what a release consists of
REFUSED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".py", ".so", ".faiss"}


def write(folder: Path, parts: Mapping[str, Mapping[str, Any]], **about: Any) -> None:
    """Describe all files of a folder.

    Args:
        folder: everything that is to be saved.
        parts: The metadata of each part other than the encoder, by its name.
        about: whatever else there is to say.
    """
    files = {name: _identity(folder / name) for name in _files_of(folder)}
    about = {
        "format_version": FORMAT_VERSION,
        "requires": REQUIRES,
        **about,
        "parts": dict(parts),
        "encoder_fingerprint": fingerprint_of(files),
        "files": files,
    }
    (folder / CONFIG).write_text(json.dumps({**about, "digest": digest_of(about)}, indent=2))


def read(path: Path) -> dict[str, Any]:
    """``xmc_config.json``, once it is known to name files of its own folder only, and nothing that runs code.

    Raises:
        ValueError: if the manifest has another format, or is damaged or hostile.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, files, parts = about.get("format_version"), about.get("files"), about.get("parts")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a manifest ({error}): get the model again (from the Hub: `force_download=True`)."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format {version!r}; this version reads {FORMAT_VERSION}.")
    if not isinstance(files, dict) or not isinstance(parts, dict) or "modules.json" not in files:
        raise ValueError(f"{path} does not name parts, files and modules.json among them: the model is not whole.")
    if about.get("digest") != digest_of(about):
        raise ValueError(
            f"{path} is not the file that was saved: get the model again (from the Hub: `force_download=True`)."
        )
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"{path} holds {', '.join(unknown)}, which this version does not know: update hf_xmc.")
    for name in files:
        names = PurePosixPath(name).parts
        if "\\" in name or ":" in name or not names or names[0] == "/" or ".." in names or str(Path(*names)) != name:
            raise ValueError(f"{path} names {name!r}, which is no file within the model's own folder.")
        if PurePosixPath(name).suffix not in LOADED:
            raise ValueError(f"{path} names {name!r}: a release holds {', '.join(sorted(LOADED))} and nothing else.")
        if is_adapter(name):
            raise ValueError(
                f"{path} names {name!r}: an adapter does not load without its base model, which is no part of the "
                "release. Load it with sentence-transformers where the base model is, and save that: it is merged then."
            )
    for part in parts:
        if not files_of_part(files, part):
            raise ValueError(f"{path} names no file of {part}: the model is not whole.")
    if about.get("encoder_fingerprint") != fingerprint_of(files):
        raise ValueError(f"{path}: the encoder is not the one that made the label embeddings.")
    return dict(about)


def check(folder: Path, parts: Iterable[str] = PARTS) -> dict[str, Any]:
    """The manifest of a folder, once every file of the encoder and of these parts is the one that was saved.

    One that is made of the others again, ``label_index/faiss.safetensors``, may be missing or changed. The manifest
    does not name it then.

    Raises:
        ValueError: if :func:`read` raises it; if a file is missing, modified or was added; or if a library is too old.
    """
    about = read(folder / CONFIG)
    try:
        for requirement in about.get("requires", []):
            require_version(requirement, "It is needed to read the model.")
    except (ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    files, changed = about["files"], set()
    for part in (None, *parts):
        for name in files_of_part(files, part):
            path = folder / name
            if path.is_file() and _identity(path) == files[name]:
                continue
            wrong = f"{path} is {'not the file that was saved' if path.exists() else 'missing'}"
            if name != REBUILT:
                raise ValueError(
                    f"{wrong}: get the model again (from the Hub: `force_download=True`), or, if the encoder was "
                    "changed on purpose, build its label index again with `hf-xmc index`."
                )
            logger.warning("%s: the index is rebuilt from the embeddings.", wrong)
            changed.add(name)
    for name in _files_of(folder):
        if name not in files and PurePosixPath(name).suffix in LOADED | REFUSED:
            raise ValueError(
                f"{folder / name} was not saved with the model, and a loader might take it for a part of it: remove it."
            )
    return {**about, "files": {name: said for name, said in files.items() if name not in changed}}


def files_of_part(files: Iterable[str], part: str | None) -> list[str]:
    """The files of a part; of the encoder, for ``None``."""
    owner = {name: first if (first := name.split("/")[0]) in PARTS else None for name in files}
    return [name for name in files if owner[name] == part]


def is_adapter(name: str) -> bool:
    """Return whether a file tells of an adapter, whose base model is not part of the folder."""
    return PurePosixPath(name).name == "adapter_config.json"


def digest_of(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own ``digest``."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def fingerprint_of(files: Mapping[str, Any]) -> str:
    """One digest of the files that make an embedding."""
    encoder = {name: files[name] for name in files_of_part(files, None)}
    return hashlib.sha256(json.dumps(encoder, sort_keys=True).encode()).hexdigest()


def _files_of(folder: Path) -> list[str]:
    # The card is for people, who may edit it; hidden files are the Hub's. Names, not where they lead: in the Hub's
    # cache files are links.
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name not in (CARD, CONFIG) and not name.startswith(".")]


def _identity(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}
