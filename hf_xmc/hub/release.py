"""Save and load the folder of a model: a sentence-transformers repository, other parts, and a manifest."""

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
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

import hf_xmc
from hf_xmc.data.labels import dataset_of
from hf_xmc.hub import backend_files, manifest, saved_index
from hf_xmc.hub.backends import Loading
from hf_xmc.hub.card import XMCCard, card_entry, read_card
from hf_xmc.hub.manifest import LAYOUT
from hf_xmc.hub.repository import Checked
from hf_xmc.hub.self_contained import write_encoder
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.memory_settings import MemorySettings
from hf_xmc.storage.folders import atomic_folder, check_replaceable
from hf_xmc.tensors import first_non_finite

logger = logging.getLogger(__name__)

_TEXT = (pa.string(), pa.large_string())
COLUMNS = {"uid": _TEXT, "text": _TEXT, "seen": (pa.bool_(),), "parent_texts": _TEXT}  # of labels
REQUIRED = ("uid", "text")

Writer = Callable[[Path], Mapping[str, Any]]  # writes a part into the folder of a release and returns its metadata


class Release(NamedTuple):
    """A saved model whose files have been checked, with its encoder loaded."""

    encoder: SentenceTransformer
    folder: Path
    parts: Mapping[str, Mapping[str, Any]]  # metadata of each part, by its file or folder
    files: Collection[str]  # files listed in the manifest, without any that must be rebuilt
    card: XMCCard | str | None  # the model card, as text if someone edited it


def check_target(folder: Path) -> None:
    """Raise if :func:`save` cannot write a model to a folder, so that a run can ask before it starts.

    Raises:
        ValueError: if the folder holds something other than a saved model, is a file, or is the working directory.
    """
    check_replaceable(folder, LAYOUT.config, "holds no saved XMCModel")


def save(
    folder: str | Path,
    encoder: SentenceTransformer,
    parts: Mapping[str, Writer],
    card: XMCCard | str,
    source: Path | None = None,
) -> None:
    """Write encoder and parts. The folder appears complete or not at all.

    The saved encoder has its adapters merged (:func:`hf_xmc.hub.self_contained.with_merged_adapters`), so that it loads
    on another machine. The given encoder keeps them.

    Args:
        folder: A new folder, or one that holds a saved model, which is replaced.
        encoder: The encoder, written to the root of the folder, where sentence-transformers reads it.
        parts: A writer for each part, by its file or folder.
        card: The model card, or the text of ``README.md``.
        source: The saved model that the encoder was loaded from, see :func:`hf_xmc.hub.backend_files.complete`.

    Raises:
        ValueError: if the folder holds something else, which is left alone; or if the encoder needs code or files that
            a release cannot hold.
        FloatingPointError: if a weight of the encoder is NaN or infinite.
    """
    folder = Path(folder)
    check_target(folder)
    with atomic_folder(folder) as new:
        write_encoder(encoder, new)
        backend_files.complete(new, encoder, source)
        text = card if isinstance(card, str) else card.render()
        (new / LAYOUT.card).write_text(text, encoding="utf-8")
        manifest.write(
            new,
            {name: write(new) for name, write in parts.items()},
            hf_xmc_version=hf_xmc.__version__,
            embedding_dim=encoder.get_embedding_dimension(),
            similarity=encoder.similarity_fn_name,
            card=card_entry(card, text),
        )


def replace_card(folder: Path, card: XMCCard) -> None:
    """Write another card into the folder of a saved model.

    Raises:
        ValueError: if the folder holds no saved model.
    """
    about, text = manifest.read(folder / LAYOUT.config), card.render()
    (folder / LAYOUT.card).write_text(text, encoding="utf-8")
    manifest.rewrite(folder, {**about, "card": card_entry(card, text)})


def load(checked: Checked, loading: Loading | None = None) -> Release:
    """Load the encoder of a release that :func:`hf_xmc.hub.repository.find` has checked.

    Args:
        checked: The release.
        loading: How the encoder is loaded; by default by torch, on the best device available.

    Raises:
        ValueError: if the encoder does not load, or not like this.
    """
    folder, about, loading = checked.folder, checked.about, loading or Loading()
    loading.check_fits(folder, folder, manifest.files_of(folder))
    try:
        encoder = loading.load(str(folder), local_files_only=True)
    except Exception as error:  # its loaders raise many exception types for malformed files
        raise ValueError(f"{folder}: the encoder does not load ({error}).") from error
    if name := first_non_finite(encoder.named_parameters()):
        logger.warning("%s: the weights %s hold NaN or infinity; texts that use them cannot be embedded.", folder, name)
    path = folder / LAYOUT.card
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    card = None if text is None else read_card(text, about.get("card"))
    parts = {name: entry for name, entry in about["parts"].items() if name in checked.parts}
    return Release(encoder, folder, parts, about["files"], card)


def write_label_index(
    folder: Path, labels: Dataset, index: LabelIndex, label_vectors: Tensor | None = None
) -> dict[str, Any]:
    """Write the label index: uids, texts and embeddings of the labels, and their vectors if any. Return its metadata.

    The embeddings contain the vectors, which are only read to rename labels and to explain scores.

    For a :class:`hf_xmc.FaissIndex`, its settings and its graph or lists are written too. Other indexes are not saved:
    the loaded model searches all labels.
    """
    (folder / LAYOUT.label_index).mkdir()
    pq.write_table(labels.with_format("arrow")[:].replace_schema_metadata(None), folder / LAYOUT.labels)
    save_file({"embeddings": index.embeddings.contiguous()}, folder / LAYOUT.label_embeddings)
    if label_vectors is not None:
        save_file({"vectors": label_vectors.contiguous()}, folder / LAYOUT.label_vectors)
    settings = saved_index.write_index(folder / LAYOUT.faiss, index, index.embeddings)
    return {"num_labels": len(labels), "embedding_dim": index.embedding_dim, **settings}


def read_label_index(release: Release) -> tuple[Dataset, Tensor]:
    """Return label texts and their embeddings ``(T, D)``, both mapped into memory.

    Raises:
        ValueError: if the files do not hold them, or their sizes do not fit.
    """
    folder = release.folder
    try:
        labels = _read_labels(folder / LAYOUT.labels)
        with safe_open(folder / LAYOUT.label_embeddings, framework="pt") as file:
            embeddings = file.get_tensor("embeddings")
    except (SafetensorError, pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder} does not hold {LAYOUT.labels} and {LAYOUT.label_embeddings} as they were saved ({error})."
        ) from None
    about = release.parts[LAYOUT.label_index]
    expected = (about.get("num_labels"), about.get("embedding_dim"))
    if tuple(embeddings.shape) != expected or len(labels) != expected[0]:
        raise ValueError(
            f"{folder}: {len(labels)} labels and embeddings of shape {tuple(embeddings.shape)}; {LAYOUT.config} says "
            f"{expected}."
        )
    return labels, embeddings


def read_label_vectors(release: Release) -> Tensor | None:
    """Return the vectors of the labels ``(L, D)``, mapped into memory; ``None`` if the model has none.

    Raises:
        ValueError: if the file does not hold them.
    """
    if LAYOUT.label_vectors not in release.files:
        return None
    path = release.folder / LAYOUT.label_vectors
    try:
        with safe_open(path, framework="pt") as file:
            vectors: Tensor = file.get_tensor("vectors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} does not hold label vectors as they were saved ({error}).") from None
    return vectors


def read_index(release: Release, exact: LabelIndex, *, check: bool = True) -> LabelIndex:
    """Return the saved index of the embeddings of ``exact``, as :func:`hf_xmc.hub.saved_index.read_index` does.

    The result is ``exact`` itself if the saved index was exact or is not known to be harmless.

    Raises:
        ValueError: if FAISS cannot build the index from the embeddings.
    """
    part = release.parts.get(LAYOUT.label_index, {})  # empty if other labels were given
    same = LAYOUT.faiss in release.files and exact.num_labels == part.get("num_labels")  # no label was left out
    path, stored = release.folder / LAYOUT.faiss, release.folder / LAYOUT.label_embeddings if same else None
    return saved_index.read_index(path, part.get("faiss"), exact.embeddings, same, stored, check=check) or exact


def _read_labels(path: Path) -> Dataset:
    # The metadata of the file is dropped: it could declare a column of texts to be names of files to open.
    table = pq.read_table(path, memory_map=True).replace_schema_metadata(None)
    for name, types in COLUMNS.items():
        if name in table.column_names and table.schema.field(name).type not in types:
            raise ValueError(f"column {name} is of type {table.schema.field(name).type}")
    return dataset_of(table.select([name for name in COLUMNS if name in table.column_names or name in REQUIRED]))


def write_training_memory(folder: Path, memory: TrainingMemory) -> dict[str, Any]:
    """Write the memory: embeddings in half precision, the labels of each query, the texts, and an index of FAISS.

    Return its metadata.
    """
    (folder / LAYOUT.training_memory).mkdir()
    tensors = {
        "embeddings": memory.index.embeddings.half().contiguous(),
        "offsets": torch.from_numpy(memory.relevance.indptr.astype(np.int64)),
        "label_ids": torch.from_numpy(memory.relevance.indices.astype(np.int32)),
    }
    save_file(tensors, folder / LAYOUT.memory_embeddings)
    if memory.texts is not None:
        pq.write_table(pa.table({"text": memory.texts}), folder / LAYOUT.memory_texts)
    index = saved_index.write_index(folder / LAYOUT.memory_faiss, memory.index, tensors["embeddings"])
    num_queries, num_labels = memory.relevance.shape
    return {"num_queries": num_queries, "num_labels": num_labels, "settings": asdict(memory.settings), **index}


def read_training_memory(release: Release) -> TrainingMemory | None:
    """Return the memory of a release, ``None`` if it has none or it was not wanted.

    Raises:
        ValueError: if the files do not hold a memory.
    """
    if LAYOUT.training_memory not in release.parts:
        return None
    folder, about = release.folder, release.parts[LAYOUT.training_memory]
    try:
        tensors = load_file(folder / LAYOUT.memory_embeddings)
        label_ids, offsets = tensors["label_ids"].numpy(), tensors["offsets"].numpy()
        shape = (about["num_queries"], about["num_labels"])
        relevance = sp.csr_array((np.ones(len(label_ids), np.float32), label_ids, offsets), shape=shape)
        relevance.check_format()
        path = folder / LAYOUT.memory_texts
        texts = pq.read_table(path)["text"].to_pylist() if path.exists() else None
        path, same = folder / LAYOUT.memory_faiss, LAYOUT.memory_faiss in release.files
        return TrainingMemory(
            tensors["embeddings"],
            relevance,
            texts,
            settings=MemorySettings(**about["settings"]),
            index=lambda rows: saved_index.read_index(path, about.get("faiss"), rows, same) or LabelIndex(rows),
        )
    except (SafetensorError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / LAYOUT.training_memory} does not hold a memory as it was saved ({error})."
        ) from None


def write_calibration(folder: Path, calibration: Calibration) -> dict[str, Any]:
    """Write the points of a calibration. Return its metadata."""
    (folder / LAYOUT.calibration).write_text(json.dumps(asdict(calibration)), encoding="utf-8")
    return {"num_points": len(calibration.scores)}


def read_calibration(release: Release) -> Calibration | None:
    """Return the calibration of a release, ``None`` if it has none or it was not wanted.

    Raises:
        ValueError: if the file does not hold a calibration.
    """
    if LAYOUT.calibration not in release.parts:
        return None
    path = release.folder / LAYOUT.calibration
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
        return Calibration.of(points)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a calibration as it was saved ({error}).") from None
