"""The index of a memory is saved with it, and loading does not build it again."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers.tiny import LABELS, make_static_encoder

from hf_xmc import FaissIndex, LabelIndex, MemorySettings, TrainingMemory, XMCModel

TEXTS = ["a red boat", "old oak tree", "dog and cat"]
STORED = "training_memory/faiss.safetensors"


@pytest.fixture(params=["HNSW8", "IVF6,SQ8"])
def model(request):
    model, rng = XMCModel(make_static_encoder(), LABELS), np.random.default_rng(0)
    known = torch.from_numpy(rng.normal(size=(300, model.index.embedding_dim))).half()
    relevance = sp.random_array((300, len(LABELS)), density=0.2, rng=rng, format="csr")

    def index(rows):
        return FaissIndex(rows, request.param, effort=1, refine=1)

    # With more neighbors, so few rows would be searched exactly.
    model.memory = TrainingMemory(known, relevance, settings=MemorySettings(neighbors=3), index=index)
    return model


def test_memory_index_is_loaded_and_not_built_again(model, tmp_path, monkeypatch):
    found, memory = model.search(TEXTS, 5), model.memory
    exact = TrainingMemory(memory.index.embeddings, memory.relevance, settings=memory.settings)
    assert not np.array_equal(found.scores, exact.search(model.embed(TEXTS), 5, model.index).scores)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("hf_xmc.search.faiss_index.made_of", lambda *_: pytest.fail("it was built again"))
    again = XMCModel.from_pretrained(tmp_path / "model")
    settings = [(index.factory, index.effort, index.refine) for index in (again.memory.index, memory.index)]
    assert settings[0] == settings[1]
    for one, other in zip(again.search(TEXTS, 5), found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_index_is_built_again_if_its_file_is_missing(model, tmp_path, caplog):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / STORED).unlink()
    again = XMCModel.from_pretrained(tmp_path / "model")
    assert "faiss.safetensors is missing: the index is rebuilt from the embeddings" in caplog.text
    np.testing.assert_array_equal(again.search(TEXTS, 5).label_ids, model.search(TEXTS, 5).label_ids)


def test_no_tables_are_saved_for_embeddings_that_saving_rounds(model, tmp_path, caplog):
    rows = model.memory.index.embeddings.float() * (1 + 1e-5)
    model.memory.index = FaissIndex(rows, model.memory.index.factory)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / STORED).exists()
    again = XMCModel.from_pretrained(tmp_path / "model")
    assert type(again.memory.index) is FaissIndex
    assert caplog.text == ""


def test_exact_memory_stays_exact(model, tmp_path):
    model.memory.index = LabelIndex(model.memory.index.embeddings)
    model.save_pretrained(tmp_path / "model")
    assert type(XMCModel.from_pretrained(tmp_path / "model").memory.index) is LabelIndex
