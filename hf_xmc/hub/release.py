"""The folder of a model: a plain sentence-transformers repository, other parts, and a manifest of all files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

import hf_xmc
from hf_xmc.hub import manifest
from hf_xmc.hub.manifest import CALIBRATION, CARD, CONFIG, LABEL_INDEX, PARTS, REBUILT, TRAINING_MEMORY
from hf_xmc.hub.self_contained import write_encoder
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.memory_settings import MemorySettings
from hf_xmc.storage.folders import check_replaceable, whole_folder
from hf_xmc.tensors import first_non_finite

logger = logging.getLogger(__name__)

LABELS, EMBEDDINGS = "labels.parquet", "embeddings.safetensors"
TEXTS = "texts.parquet"
_TEXT = (pa.string(), pa.large_string())
COLUMNS = {"label_id": _TEXT, "text": _TEXT, "seen": (pa.bool_(),)}  # of the labels; the last may be absent

Writer = Callable[[Path], Mapping[str, Any]]  # writes a part where it is told to, and says what the part is


class Release(NamedTuple):
    """A saved model whose files have been checked: its encoder, and where its parts lie."""

    encoder: SentenceTransformer
    folder: Path
    parts: Mapping[str, Mapping[str, Any]]  # what each part says of itself
    files: Collection[str]  # that the manifest names, but for one to be rebuilt
    card: str | None


def check_target(folder: Path) -> None:
    """Raise if a model cannot be saved to a folder; :func:`save` asks this first, and so may a run that ends with it.

    Raises:
        ValueError: if the folder holds something else than a saved model, is a file, or the process works in it.
    """
    check_replaceable(folder, CONFIG, "holds no saved XMCModel")


def save(folder: str | Path, encoder: SentenceTransformer, parts: Mapping[str, Writer], card: str) -> None:
    """Write encoder and parts; the folder appears whole or not at all.

    Adapters are merged into what is saved (:func:`hf_xmc.hub.self_contained.with_merged_adapters`), so that it loads on
    another machine; the encoder itself keeps them.

    Args:
        folder: a new folder, or one that holds a saved model, which is replaced.
        encoder: what stands at the root, where sentence-transformers reads it.
        parts: by their names, which are those of :data:`hf_xmc.hub.manifest.PARTS`, what writes them.
        card: the text of ``README.md``.

    Raises:
        ValueError: if the folder holds something else, which is left alone; or if the encoder needs code or files that
            are no part of it.
        FloatingPointError: if a weight of the encoder is NaN or infinite.
    """
    folder = Path(folder)
    check_target(folder)
    with whole_folder(folder) as new:
        write_encoder(encoder, new)
        (new / CARD).write_text(card, encoding="utf-8")
        said = {name: write(new / name) for name, write in parts.items()}
        manifest.write(
            new,
            said,
            hf_xmc_version=hf_xmc.__version__,
            embedding_dim=encoder.get_embedding_dimension(),
            similarity=encoder.similarity_fn_name,
        )


def load(folder: Path, device: str | None = None, parts: Collection[str] = PARTS) -> Release:
    """Read what :func:`save` wrote, after a check that every file is the one that was saved.

    Args:
        folder: of a saved model.
        device: where the encoder goes; by default the best there is.
        parts: The parts to read in addition to the encoder. Other parts may be missing.

    Raises:
        ValueError: if the model is incomplete or a file was modified.
    """
    about = manifest.check(folder, parts)
    try:
        encoder = SentenceTransformer(str(folder), device=device, local_files_only=True)
    except Exception as error:  # its loaders raise many types for malformed files
        raise ValueError(f"{folder}: the encoder does not load ({error}).") from error
    if name := first_non_finite(encoder.named_parameters()):
        logger.warning("%s: the weights %s hold NaN or infinity; texts that use them cannot be embedded.", folder, name)
    card = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else None
    said = {name: said for name, said in about["parts"].items() if name in parts}
    return Release(encoder, folder, said, about["files"], card)


def write_label_index(folder: Path, labels: Dataset, index: LabelIndex) -> dict[str, Any]:
    """The part ``label_index``: the labels' names and texts, and their embeddings; of a :class:`hf_xmc.FaissIndex` its
    settings and what takes long to build, too. Another index is not saved."""
    from hf_xmc.search.faiss_index import FaissIndex

    folder.mkdir()
    pq.write_table(labels.with_format("arrow")[:].replace_schema_metadata(None), folder / LABELS)
    save_file({"embeddings": index.embeddings.contiguous()}, folder / EMBEDDINGS)
    said = {"num_labels": len(labels), "embedding_dim": index.embedding_dim}
    if not isinstance(index, FaissIndex):
        return said
    if state := index.state():
        save_arrays(state, folder.parent / REBUILT)
    return {**said, "faiss": {"factory": index.built, "effort": index.effort, "refine": index.refine}}


def read_label_index(release: Release) -> tuple[Dataset, Tensor]:
    """Labels and embeddings ``(L, D)``, both mapped into memory rather than read.

    Raises:
        ValueError: if the files hold something else.
    """
    folder = release.folder / LABEL_INDEX
    try:
        labels = _read_labels(folder / LABELS)
        with safe_open(folder / EMBEDDINGS, framework="pt") as file:
            embeddings = file.get_tensor("embeddings")
    except (SafetensorError, pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} does not hold {LABELS} and {EMBEDDINGS} as they were saved ({error}).") from None
    said = release.parts[LABEL_INDEX]
    expected = (said.get("num_labels"), said.get("embedding_dim"))
    if tuple(embeddings.shape) != expected or len(labels) != expected[0]:
        raise ValueError(
            f"{folder}: {len(labels)} labels and embeddings of shape {tuple(embeddings.shape)}; {CONFIG} says "
            f"{expected}."
        )
    return labels, embeddings


def read_index(release: Release, exact: LabelIndex) -> LabelIndex:
    """Return the saved index of the embeddings of ``exact``; ``exact`` itself if the saved index was exact.

    The stored graph or lists are used if their hash, size and shape are right. Otherwise the index is rebuilt, with a
    warning. If the settings are not known to be harmless, ``exact`` is returned, with a warning.

    Raises:
        ValueError: if FAISS cannot build the index from the embeddings.
    """
    part = release.parts.get(LABEL_INDEX, {})
    if (said := part.get("faiss")) is None:
        return exact
    from hf_xmc.search.faiss_factory import TooFewLabels
    from hf_xmc.search.faiss_index import FaissIndex
    from hf_xmc.search.faiss_tables import checked_settings, most_bytes

    folder, size = release.folder / LABEL_INDEX, (exact.num_labels, exact.embedding_dim)
    try:
        settings = checked_settings(said, *size)
    except ValueError as error:
        logger.warning("%s: %s; all labels are searched instead.", folder, error)
        return exact
    try:
        if REBUILT in release.files and exact.num_labels == part["num_labels"]:  # none was left out
            try:
                state = _read_arrays(release.folder / REBUILT, most_bytes(settings["factory"], *size))
                return FaissIndex(exact.embeddings, **settings, state=state)
            except (SafetensorError, OSError, TypeError, ValueError) as error:
                wrong = f"{release.folder / REBUILT} holds no such index ({error})"
                logger.warning("%s: the index is rebuilt from the embeddings.", wrong)
        return FaissIndex(exact.embeddings, **settings)
    except TooFewLabels as error:
        logger.warning("%s: %s All labels are searched instead.", folder, error)
        return exact
    except ValueError as error:
        raise ValueError(f"{folder}: no index {settings['factory']} can be made ({error})") from None


def _read_arrays(path: Path, most: int) -> dict[str, np.ndarray]:
    if path.stat().st_size > most:
        raise ValueError(f"more than {most} bytes")
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dictionary


def _read_labels(path: Path) -> Dataset:
    # What the file says of itself beside its table is left out: texts are texts, and no names of files to be opened.
    table = pq.read_table(path, memory_map=True).replace_schema_metadata(None)
    for name, types in COLUMNS.items():
        if name in table.column_names and table.schema.field(name).type not in types:
            raise ValueError(f"column {name} is of type {table.schema.field(name).type}")
    return Dataset(table.select([name for name in COLUMNS if name in table.column_names or name != "seen"]))


def write_training_memory(folder: Path, memory: TrainingMemory) -> dict[str, Any]:
    """The part ``training_memory``: embeddings in half precision, the labels of each query, and the texts."""
    folder.mkdir()
    tensors = {
        "embeddings": memory.index.embeddings.half().contiguous(),
        "offsets": torch.from_numpy(memory.relevance.indptr.astype(np.int64)),
        "label_ids": torch.from_numpy(memory.relevance.indices.astype(np.int32)),
    }
    save_file(tensors, folder / EMBEDDINGS)
    if memory.texts is not None:
        pq.write_table(pa.table({"text": memory.texts}), folder / TEXTS)
    num_queries, num_labels = memory.relevance.shape
    return {"num_queries": num_queries, "num_labels": num_labels, "settings": asdict(memory.settings)}


def read_training_memory(release: Release) -> TrainingMemory | None:
    """The memory, if the release has one.

    Raises:
        ValueError: if the files hold something else.
    """
    if TRAINING_MEMORY not in release.parts:
        return None
    folder, said = release.folder / TRAINING_MEMORY, release.parts[TRAINING_MEMORY]
    try:
        tensors = load_file(folder / EMBEDDINGS)
        label_ids, offsets = tensors["label_ids"].numpy(), tensors["offsets"].numpy()
        shape = (said["num_queries"], said["num_labels"])
        relevance = sp.csr_array((np.ones(len(label_ids), np.float32), label_ids, offsets), shape=shape)
        relevance.check_format()
        texts = pq.read_table(folder / TEXTS)["text"].to_pylist() if (folder / TEXTS).exists() else None
        return TrainingMemory(tensors["embeddings"], relevance, texts, settings=MemorySettings(**said["settings"]))
    except (SafetensorError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not hold a memory as it was saved ({error}).") from None


def write_calibration(path: Path, calibration: Calibration) -> dict[str, Any]:
    """The part ``calibration.json``: the points of the map."""
    path.write_text(json.dumps(asdict(calibration)), encoding="utf-8")
    return {"num_points": len(calibration.scores)}


def _calibration_of(points: dict[str, Any]) -> Calibration:
    scores, probabilities = tuple(points["scores"]), tuple(points["probabilities"])
    deeper = points.get("deeper")
    return Calibration(scores, probabilities, points.get("first"), deeper and _calibration_of(deeper))


def read_calibration(release: Release) -> Calibration | None:
    """The calibration, if the release has one.

    Raises:
        ValueError: if the file holds something else.
    """
    if CALIBRATION not in release.parts:
        return None
    path = release.folder / CALIBRATION
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
        return _calibration_of(points)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a calibration as it was saved ({error}).") from None
