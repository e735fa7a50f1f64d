"""The files of other backends in a saved model: kept with the weights that they were made from, and with no others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from sentence_transformers import SentenceTransformer

from hf_xmc.hub.backends import TORCH, backend_of
from hf_xmc.hub.manifest import files_of, files_of_part, identity

logger = logging.getLogger(__name__)

WEIGHTS = ".safetensors"


def complete(new: Path, encoder: SentenceTransformer, source: Path | None) -> None:
    """Add to a saved encoder what the backend that it was loaded with does not save.

    Args:
        new: Folder of the saved encoder.
        encoder: The encoder.
        source: Folder of the saved model that the encoder was loaded from; ``None`` if it was not loaded.

    An encoder of torch gets the files of other backends, unless its weights have changed. They are left out then, with
    a warning. An encoder of another backend gets all files of its source, the weights of torch among them, so that it
    loads with every backend that its source had. A file that the backend exported when it was loaded is kept too.

    Raises:
        ValueError: if an encoder of another backend has no source with weights of torch.
    """
    old = files_of_part(files_of(source), None) if source is not None and source.is_dir() else []
    others = [name for name in old if backend_of(name) is not None]
    backend = getattr(encoder, "backend", TORCH)
    if source is None or not old:
        if backend != TORCH:
            raise ValueError(
                f"the encoder was loaded with `backend={backend!r}`, which does not save the weights of torch, and the "
                "saved model that it was loaded from is not there. Load it with `backend='torch'`, save it, and load "
                f"that with `backend={backend!r}`."
            )
        return
    if backend != TORCH:
        if any(backend_of(name) == backend for name in others):
            _remove_exported(new, backend)  # it may have another name than the file that was loaded
        _copy(source, new, old)
    elif others and not _same_weights(source, new, old):
        logger.warning(
            "%s not saved: the weights are not those of %s. Export the saved model again.",
            f"{', '.join(others)} {'are' if len(others) > 1 else 'is'}",
            source,
        )
    else:
        _copy(source, new, others)


def _same_weights(source: Path, new: Path, names: Collection[str]) -> bool:
    weights = [name for name in names if name.endswith(WEIGHTS)]
    return all((new / name).is_file() and identity(new / name) == identity(source / name) for name in weights)


def _remove_exported(new: Path, backend: str) -> None:
    for name in files_of(new):
        if backend_of(name) == backend:
            (new / name).unlink()


def _copy(source: Path, new: Path, names: Collection[str]) -> None:
    """Copy files that are missing."""
    for name in names:
        if not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, new / name)  # the content of a link, and not its mode
