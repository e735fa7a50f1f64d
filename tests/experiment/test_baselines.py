"""Simple methods are measured as a hand would, and only if they can be."""

import sys
import tracemalloc
import types

import numpy as np
import pytest
import scipy.sparse as sp
from datasets import Dataset

from hf_xmc import XMCData
from hf_xmc.experiment.baselines import DEEP, MOST_FREQUENT, OMIKUJI, SIMILAR_TEXTS, measure_baselines, neighbors


def test_baselines_are_those_that_a_hand_computes(monkeypatch):
    train = Dataset.from_dict(
        {"text": ["red boat", "red boat", "old tree", "old tree"], "label_ids": [[0], [0, 1], [2], [2]]}
    )
    test = Dataset.from_dict({"text": ["a red boat", "an old tree"], "label_ids": [[1], [2]]})
    data = XMCData(train, Dataset.from_dict({"uid": ["a", "b", "c"], "text": ["x", "y", "z"]}), test=test)
    found = measure_baselines(data, "test")
    assert set(found) == {MOST_FREQUENT, SIMILAR_TEXTS}
    assert (found[MOST_FREQUENT]["P@1"], found[MOST_FREQUENT]["R@10"]) == (0.0, 1.0)  # 0 comes first, then 2, then 1
    assert found[SIMILAR_TEXTS]["P@1"] == 0.5  # two votes for 0, one for 1; two for 2
    assert found[SIMILAR_TEXTS]["P@3"] == pytest.approx(1 / 3)
    monkeypatch.setattr("hf_xmc.experiment.baselines.MAX_PAIRS", 1)
    assert set(measure_baselines(data, "test")) == {MOST_FREQUENT}


def test_labels_without_a_vote_are_padding():
    known = sp.csr_matrix(np.array([[1.0, 0.0], [0.6, 0.8]], np.float32))
    relevance = sp.csr_array(np.array([[0, 1, 0, 1], [1, 1, 0, 0]], np.float32))
    asked = sp.csr_matrix(np.array([[1.0, 0.0], [0.0, 0.0]], np.float32))
    found = neighbors(known, relevance, asked, 2)
    assert found.shape == (2, DEEP)
    assert found[0, :4].tolist() == [1, 3, 0, -1]  # 1 + 0.36, 1 and 0.36 of the votes
    assert (found[1] == -1).all()


def test_neighbors_need_no_table_of_all_texts_and_labels(monkeypatch):
    monkeypatch.setattr("hf_xmc.experiment.baselines.CELLS", 2**16)
    size = 2000
    known = sp.eye_array(size, format="csr", dtype=np.float32)
    relevance = sp.csr_array(sp.eye_array(size, dtype=np.float32))
    tracemalloc.start()
    found = neighbors(known, relevance, known, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found[:, 0] == np.arange(size)).all()
    assert peak < 8 * size * size / 2  # bytes of such a table


def test_omikuji_is_measured_if_it_is_installed(monkeypatch):
    """A stand-in for the package, which gives the true labels of the file that it is trained on."""
    trained = []

    class Model:
        default_hyper_param = staticmethod(types.SimpleNamespace)

        @classmethod
        def train_on_data(cls, path, parameters, n_threads):
            with open(path) as file:
                trained.extend(file.read().splitlines())
            return cls()

        def predict(self, features, beam_size, top_k):
            return [(2, 0.9), (0, 0.1)]

    fake = types.ModuleType("omikuji")
    fake.Model = Model
    monkeypatch.setitem(sys.modules, "omikuji", fake)
    monkeypatch.setattr("hf_xmc.experiment.baselines.find_spec", lambda name: name == "omikuji")
    train = Dataset.from_dict(
        {"text": ["red boat", "red boat", "old", "old tree"], "label_ids": [[0], [0, 1], [2], [2]]}
    )
    data = XMCData(train, Dataset.from_dict({"text": ["x", "y", "z"]}), test=train)
    assert measure_baselines(data, "test")[OMIKUJI]["P@1"] == 0.5
    assert trained[0] == "4 4 3"
    assert trained[2].startswith("0,1 ")


def test_a_broken_omikuji_is_left_out_with_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "omikuji", None)  # its import fails
    monkeypatch.setattr("hf_xmc.experiment.baselines.find_spec", lambda name: name == "omikuji")
    train = Dataset.from_dict({"text": ["red boat", "red boat"], "label_ids": [[0], [1]]})
    found = measure_baselines(XMCData(train, Dataset.from_dict({"text": ["x", "y"]}), test=train), "test")
    assert OMIKUJI not in found
    assert "Omikuji is installed but not measured, because its import fails" in caplog.text
