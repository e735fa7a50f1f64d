"""Rows of a large table are read from its file, so that a search does not map the file into memory."""

import pickle

import numpy as np
import pytest
import torch
from helpers.tiny import make_static_encoder

from hf_xmc import FaissIndex, LabelIndex, XMCModel
from hf_xmc.hub import saved_index
from hf_xmc.search.stored_rows import StoredRows

RNG = np.random.default_rng(0)
LABELS, QUERIES = RNG.normal(size=(300, 12)).astype(np.float32), RNG.normal(size=(70, 12)).astype(np.float32)
EMBEDDINGS = "label_index/embeddings.safetensors"


def saved_model(folder, labels=LABELS, factory="IVF8,Int8"):
    names = [f"label {row}" for row in range(len(labels))]
    model = XMCModel(make_static_encoder(dim=12), names, torch.from_numpy(labels))
    model.index = FaissIndex(model.index.embeddings, factory, effort=8)
    model.save_pretrained(folder)
    return model


def same(found, other):
    np.testing.assert_array_equal(found.label_ids, other.label_ids)
    np.testing.assert_allclose(found.scores, other.scores, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_are_those_of_the_file(tmp_path, dtype):
    (tmp_path / "table").write_bytes(b"header" + LABELS.astype(dtype).tobytes())
    rows = StoredRows(tmp_path / "table", np.dtype(dtype), LABELS.shape, offset=6)
    ids = np.array([[299, 0, 7], [7, -1, 41]])
    np.testing.assert_array_equal(rows[ids], LABELS.astype(dtype)[ids])
    assert rows[np.empty((2, 0), np.int64)].shape == (2, 0, 12)


def test_short_file_is_refused(tmp_path):
    (tmp_path / "table").write_bytes(LABELS.tobytes()[:-1])
    with pytest.raises(OSError, match="must hold 14400 bytes for its rows, got 14399"):
        StoredRows(tmp_path / "table", LABELS.dtype, LABELS.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_loaded_index_ranks_candidates_of_its_file(tmp_path, monkeypatch, dtype):
    labels = LABELS.astype(dtype)
    saved_model(tmp_path / "model", labels)
    monkeypatch.setattr(saved_index, "MAPPED_BYTES", 0)
    index = XMCModel.from_pretrained(tmp_path / "model", verify=False).index
    (tmp_path / "model" / EMBEDDINGS).unlink()  # as an update of the folder does
    index.embeddings = torch.zeros(300, 12)  # not read
    same(index.search(QUERIES, 9), LabelIndex(labels).search(QUERIES, 9))


def test_changed_labels_are_not_ranked_by_the_file(tmp_path, monkeypatch):
    saved_model(tmp_path / "model")
    monkeypatch.setattr(saved_index, "MAPPED_BYTES", 0)
    model = XMCModel.from_pretrained(tmp_path / "model")
    assert model.index._stored_rows is not None
    model.index.replace([3, 200], QUERIES[:2])
    same(model.index.search(QUERIES, 9), LabelIndex(model.index.embeddings).search(QUERIES, 9))


def test_another_process_needs_no_file(tmp_path, monkeypatch):
    saved_model(tmp_path / "model")
    monkeypatch.setattr(saved_index, "MAPPED_BYTES", 0)
    index = XMCModel.from_pretrained(tmp_path / "model").index
    other = pickle.loads(pickle.dumps(index))
    assert index._stored_rows is not None
    assert other._stored_rows is None
    same(other.search(QUERIES, 9), index.search(QUERIES, 9))


def test_small_tables_are_mapped(tmp_path):
    saved_model(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").index._stored_rows is None
