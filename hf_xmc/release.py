"""The folder of a model: a plain sentence-transformers repository, its label index, and a manifest of both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

import hf_xmc

CONFIG = "xmc_config.json"  # written last: a folder without it is not a whole model
LABELS = "label_index/labels.parquet"
EMBEDDINGS = "label_index/embeddings.safetensors"
FORMAT_VERSION = 1
LOADED = {".json", ".txt", ".safetensors", ".model", ".parquet", ".jinja"}  # what a release consists of
REFUSED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".py", ".so"}


def save(folder: str | Path, encoder: SentenceTransformer, labels: Dataset, embeddings: Tensor) -> None:
    """Write encoder, labels and their embeddings; the folder appears whole or not at all.

    Raises:
        ValueError: the folder holds something else, which is left alone.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise ValueError(f"{folder} exists and holds no saved XMCModel: choose another folder, it is left as it is.")
    new, old = (folder.with_name(f"{folder.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    new.mkdir(parents=True)
    try:
        encoder.save_pretrained(str(new))
        (new / LABELS).parent.mkdir()
        pq.write_table(labels.with_format("arrow")[:], new / LABELS)
        save_file({"embeddings": embeddings.contiguous()}, new / EMBEDDINGS)
        files = {name: _identity(new / name) for name in _files_of(new)}
        about = {
            "format_version": FORMAT_VERSION,
            "hf_xmc_version": hf_xmc.__version__,
            "num_labels": len(labels),
            "embedding_dim": embeddings.shape[1],
            "similarity": encoder.similarity_fn_name,
            "encoder_fingerprint": _fingerprint(files),
            "files": files,
        }
        (new / CONFIG).write_text(json.dumps(about, indent=2))
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, device: str | None = None) -> tuple[SentenceTransformer, Dataset, Tensor]:
    """Read what :func:`save` wrote, after a check that every file is the one that was saved.

    The embeddings are mapped into memory, not read.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is not a whole model, or a file was changed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    if not (folder / CONFIG).exists():
        if (folder / "modules.json").exists():
            raise ValueError(
                f"{folder} is an encoder without a label index: make one with "
                f"`hf-xmc index {folder} --labels LABELS --output_dir FOLDER`, or XMCModel(encoder, labels)."
            )
        raise ValueError(f"{folder} has no {CONFIG}: it is not a saved XMCModel, or was not saved to the end.")
    about = read_config(folder / CONFIG)
    for name, saved in about["files"].items():
        path = folder / name
        if not path.is_file() or _identity(path) != saved:
            raise ValueError(
                f"{path} is {'not the file that was saved' if path.exists() else 'missing'}: get the model again, or, "
                "if the encoder was changed on purpose, build its label index anew with `hf-xmc index`."
            )
    for name in _files_of(folder):
        if name not in about["files"] and PurePosixPath(name).suffix in LOADED | REFUSED:
            raise ValueError(
                f"{folder / name} was not saved with the model, and a loader might take it for a part of it: remove it."
            )
    labels = Dataset(pq.read_table(folder / LABELS, memory_map=True))
    try:
        with safe_open(folder / EMBEDDINGS, framework="pt") as file:
            embeddings = file.get_tensor("embeddings")
    except SafetensorError as error:
        raise ValueError(f"{folder / EMBEDDINGS} is no safetensors file of embeddings ({error}).") from None
    if list(embeddings.shape) != [about["num_labels"], about["embedding_dim"]] or len(labels) != about["num_labels"]:
        raise ValueError(
            f"{folder}: {len(labels)} labels and embeddings of shape {tuple(embeddings.shape)}; {CONFIG} says "
            f"({about['num_labels']}, {about['embedding_dim']})."
        )
    try:
        encoder = SentenceTransformer(str(folder), device=device, local_files_only=True)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: the encoder does not load ({error}).") from error
    return encoder, labels, embeddings


def read_config(path: Path) -> dict[str, Any]:
    """``xmc_config.json``, once it is known to name files of its own folder only, and nothing that runs code.

    Raises:
        ValueError: another format, or a manifest that is damaged or hostile.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, files = about.get("format_version"), about.get("files")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest ({error}).") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format {version!r}; this version reads {FORMAT_VERSION}.")
    if not isinstance(files, dict) or not {LABELS, EMBEDDINGS, "modules.json"} <= set(files):
        raise ValueError(f"{path} does not name {LABELS}, {EMBEDDINGS} and modules.json: the model is not whole.")
    for name in files:
        parts = PurePosixPath(name).parts
        if "\\" in name or ":" in name or not parts or parts[0] == "/" or ".." in parts or str(Path(*parts)) != name:
            raise ValueError(f"{path} names {name!r}, which is no file within the model's own folder.")
        if PurePosixPath(name).suffix not in LOADED:
            raise ValueError(f"{path} names {name!r}: a release holds {', '.join(sorted(LOADED))} and nothing else.")
    if about.get("encoder_fingerprint") != _fingerprint(files):
        raise ValueError(f"{path}: the encoder is not the one that made the label embeddings.")
    return dict(about)


def _fingerprint(files: dict[str, Any]) -> str:
    """One digest of the files that make an embedding."""
    encoder = {name: identity for name, identity in files.items() if not name.startswith("label_index/")}
    return hashlib.sha256(json.dumps(encoder, sort_keys=True).encode()).hexdigest()


def _files_of(folder: Path) -> list[str]:
    # The card is for people, who may edit it; hidden files are the Hub's.
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name not in ("README.md", CONFIG) and not name.startswith(".")]


def _identity(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}
