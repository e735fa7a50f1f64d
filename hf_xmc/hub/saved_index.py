"""Save and load the settings and the graph or lists of an approximate index of labels or of remembered queries."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.stored_rows import StoredRows

logger = logging.getLogger(__name__)

CODES = "codes"  # the table that stays in its file
MAPPED_BYTES = 2**28  # a larger table of embeddings is not mapped for single rows


def write_index(path: Path, index: LabelIndex, stored: Tensor) -> dict[str, Any]:
    """Write the graph or lists of a :class:`hf_xmc.FaissIndex`, and return its settings; nothing of other indexes.

    Args:
        path: File to write.
        index: The index.
        stored: The embeddings as they are saved. If they were rounded, the graph or lists are not written, because
            they belong to other embeddings: the index is built again when it is loaded.
    """
    from hf_xmc.search.faiss_index import FaissIndex

    if not isinstance(index, FaissIndex):
        return {}
    if stored.dtype == index.embeddings.dtype and (state := index.state()):
        save_file(state, path)
    return {"faiss": {"factory": index.built, "effort": index.effort, "refine": index.refine}}


def read_index(
    path: Path,
    saved: Any,
    embeddings: Tensor,
    has_tables: bool,
    stored: Path | None = None,
    *,
    check: bool = True,
) -> LabelIndex | None:
    """Return the index that :func:`write_index` saved; ``None`` if all rows are to be searched.

    The stored graph or lists are used if their size and shape are right. Otherwise the index is rebuilt, with a
    warning. If the settings are not known to be harmless, ``None`` is returned, with a warning.

    Args:
        path: File of the graph or lists.
        saved: The settings, unchecked; ``None`` if the saved index was exact.
        embeddings: ``(N, D)``, the embeddings to index.
        has_tables: Whether the file may be used: it is the one that was saved, and no row was left out.
        stored: File of the table ``embeddings``. If it is large, the index reads single rows from it.
        check: Whether to check that the tables belong to the embeddings, which reads them all.

    Raises:
        ValueError: if FAISS cannot build the index from the embeddings.
    """
    if saved is None:
        return None
    from hf_xmc.search.faiss_factory import TooFewLabels
    from hf_xmc.search.faiss_index import FaissIndex
    from hf_xmc.search.faiss_tables import checked_settings, most_bytes

    folder, size = path.parent, (len(embeddings), embeddings.shape[1])
    try:
        settings = checked_settings(saved, *size)
    except ValueError as error:
        logger.warning("%s: %s; all rows are searched instead.", folder, error)
        return None
    try:
        if has_tables:
            try:
                state = _read_arrays(path, most_bytes(settings["factory"], *size))
                rows = None if stored is None else _rows_of(stored, embeddings)
                return FaissIndex.from_state(embeddings, state=state, stored_rows=rows, check=check, **settings)
            except (SafetensorError, OSError, TypeError, ValueError) as error:
                wrong = f"{path} holds no such index ({error})"
                logger.warning("%s: the index is rebuilt from the embeddings.", wrong)
        return FaissIndex(embeddings, **settings)
    except TooFewLabels as error:
        logger.warning("%s: %s All rows are searched instead.", folder, error)
        return None
    except ValueError as error:
        raise ValueError(f"{folder}: no index {settings['factory']} can be made ({error})") from None


def _rows_of(path: Path, embeddings: Tensor) -> StoredRows | None:
    """Return the rows of ``embeddings`` in their file; ``None`` if they are few, or converted when they are loaded."""
    dtype, (num_rows, dim), start = _place(path, "embeddings")
    if embeddings.nbytes <= MAPPED_BYTES or dtype not in ("F32", "F16") or not hasattr(os, "pread"):
        return None
    return StoredRows(path, embeddings.numpy().dtype, (num_rows, dim), start)


def _read_arrays(path: Path, most: int) -> dict[str, np.ndarray]:
    if path.stat().st_size > most:
        raise ValueError(f"more than {most} bytes")
    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        arrays = {name: file.get_tensor(name) for name in names - {CODES}}
    return {**arrays, CODES: _mapped(path, CODES)} if CODES in names else arrays


def _mapped(path: Path, name: str) -> np.ndarray:
    """Return a table of bytes that stays in its file, which ``safe_open`` has checked."""
    dtype, (size, *others), start = _place(path, name)
    if dtype != "U8" or others or not size:
        raise ValueError(f"`{name}` must be a table of bytes")
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=(size,))


def _place(path: Path, name: str) -> tuple[str, list[int], int]:
    """Return type and shape of a table, and its first byte in a file that ``safe_open`` has checked."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))[name]
    return about["dtype"], about["shape"], 8 + size + about["data_offsets"][0]
