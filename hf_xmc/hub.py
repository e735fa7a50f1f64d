"""The files of a model: a plain sentence-transformers repository, and a label index beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

CONFIG = "xmc_config.json"  # written last: a folder without it is not a whole model
LABELS = "label_index/labels.parquet"
EMBEDDINGS = "label_index/embeddings.safetensors"
FORMAT_VERSION = 1


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
        about = {
            "format_version": FORMAT_VERSION,
            "num_labels": len(labels),
            "embedding_dim": embeddings.shape[1],
            "files": {name: _identity(new / name) for name in _files_of(new)},
        }
        (new / CONFIG).write_text(json.dumps(about, indent=2))
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path, device: str | None = None) -> tuple[SentenceTransformer, Dataset, Tensor]:
    """Read what :func:`save` wrote, after a check that every file is the one that was saved.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is not a whole model, or a file was changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    if not (folder / CONFIG).exists():
        if (folder / "modules.json").exists():
            raise ValueError(
                f"{folder} is an encoder without a label index: make one with "
                f"`hf-xmc index {folder} --labels LABELS --output_dir FOLDER`, or XMCModel(encoder, labels)."
            )
        raise ValueError(f"{folder} has no {CONFIG}: it is not a saved XMCModel, or was not saved to the end.")
    about = json.loads((folder / CONFIG).read_text())
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} is of format {about.get('format_version')!r}; this version reads {FORMAT_VERSION}."
        )
    for name, saved in about["files"].items():
        path = folder / name
        if not path.exists() or _identity(path) != saved:
            raise ValueError(
                f"{path} is {'not the file that was saved' if path.exists() else 'missing'}: get the model again, or, "
                "if the encoder was changed on purpose, build its label index anew with `hf-xmc index`."
            )
    encoder = SentenceTransformer(str(folder), device=device)
    labels = Dataset.from_parquet(str(folder / LABELS), keep_in_memory=True)
    return encoder, labels, load_file(folder / EMBEDDINGS)["embeddings"]


def _files_of(folder: Path) -> list[str]:
    # The card is for people, who may edit it.
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != "README.md"]


def _identity(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}
