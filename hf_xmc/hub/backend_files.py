"""The files of other backends in a saved model: kept with the weights that they were made from, and with no others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from sentence_transformers import SentenceTransformer

from hf_xmc.hub.backends import TORCH, backend_of
from hf_xmc.hub.manifest import LAYOUT, files_of, files_of_part, identity, read

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
    loads with every backend that its source had. A file that the backend exported when it was loaded is kept if the
    source had none of this backend. A download has the files of one backend; a warning names the others.

    Raises:
        ValueError: if an encoder of another backend has no source with weights of torch.
    """
    old = files_of_part(files_of(source), None) if source is not None and source.is_dir() else []
    others = [name for name in old if backend_of(name) is not None]
    backend = getattr(encoder, "backend", TORCH)
    if source is None or not old:
        if backend != TORCH:
            raise ValueError(
                f"the encoder was loaded with `backend={backend!r}`, which does not save the weights of torch, and "
                "there is no saved model to copy them from. Load it with `backend='torch'`, save it, and load that "
                f"with `backend={backend!r}`."
            )
        return
    if absent := _not_downloaded(source):
        logger.warning(
            "%s not saved: %s was downloaded without %s. Load each backend once and copy its files, or export again.",
            f"{', '.join(absent)} {'are' if len(absent) > 1 else 'is'}",
            source,
            "them" if len(absent) > 1 else "it",
        )
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


def _not_downloaded(source: Path) -> list[str]:
    """Return the files of other backends that a saved model lists, and that are not in its folder."""
    listed = read(source / LAYOUT.config)["files"] if (source / LAYOUT.config).is_file() else ()
    return [name for name in listed if backend_of(name) is not None and not (source / name).is_file()]


def _remove_exported(new: Path, backend: str) -> None:
    """Remove all that a backend saved in its folder, its settings included."""
    for name in files_of(new):
        if PurePosixPath(name).parent.name == backend:
            (new / name).unlink()


def _copy(source: Path, new: Path, names: Collection[str]) -> None:
    """Copy files that are missing."""
    for name in names:
        if not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, new / name)  # the content of a link, and not its mode
