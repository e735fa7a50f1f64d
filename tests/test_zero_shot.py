"""What the zero-shot recipe hides, ranks by words, and counts, by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_xmc import TopK, XMCData

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import zero_shot

NAMES = ["boat", "car", "pet", "tree"]


@pytest.fixture
def data():
    return XMCData(
        train=Dataset.from_dict({"text": ["a", "b", "c"], "label_ids": [[0, 2], [2], [3]]}),
        test=Dataset.from_dict({"text": ["d", "e", "f"], "label_ids": [[2, 3], [0], [1, 2]]}),
        labels=Dataset.from_dict({"label_id": NAMES, "text": NAMES}),
        filter_pairs={"train": np.array([[0, 0], [1, 2], [2, 3]]), "test": np.array([[0, 1], [2, 0]])},
    )


def test_hidden_labels_leave_no_trace(data):
    known = zero_shot.with_labels(data, np.array([3, 0]))  # and these two change places
    assert list(known.labels["text"]) == ["tree", "boat"]
    assert known.train[:] == {"text": ["a", "c"], "label_ids": [[1], [0]]}
    assert known.test[:] == {"text": ["d", "e", "f"], "label_ids": [[0], [1], []]}
    assert known.filter_pairs["train"].tolist() == [[0, 1], [1, 0]]
    assert known.filter_pairs["test"].tolist() == [[2, 1]]


def test_hidden_and_seen_labels_are_measured_among_themselves(data):
    asked = []

    def search(texts, k, *, exclude, allow=None):  # ranks labels by their numbers
        asked.append((texts, exclude.tolist(), None if allow is None else allow.tolist()))
        ids = np.arange(4) if allow is None else allow
        row = np.concatenate([ids, np.full(k - len(ids), -1)])
        return TopK(np.tile(row, (len(texts), 1)), np.zeros((len(texts), k)))

    metrics = zero_shot.measured(search, data, num_seen=2)  # pet and tree are hidden
    assert asked[0] == (["d", "f"], [[0, 1], [1, 0]], [2, 3])
    assert asked[2][2] is None
    assert asked[3] == (["e", "f"], [[1, 0]], [0, 1])
    assert (metrics["hidden P@1"], metrics["hidden R@10"]) == (1, 1)
    assert metrics["seen P@1"] == 0.5
    assert (metrics["hidden queries"], metrics["seen queries"]) == (2, 2)


def test_bm25_worked_out_by_hand():
    # Two labels of one and three words, two on average; "boat" is in both, "sail" in one.
    index = zero_shot.BM25(["boat", "boat sail sail"])
    found = index.search(["sail boat", "boat"], 2, exclude=np.empty((0, 2), int))
    rare, common = np.log(1 + 1.5 / 1.5), np.log(1 + 0.5 / 2.5)
    short = common / (1 + 1.5 * (0.25 + 0.75 / 2))
    long = common / (1 + 1.5 * (0.25 + 0.75 * 3 / 2)), rare * 2 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2))
    assert found.label_ids.tolist() == [[1, 0], [0, 1]]
    np.testing.assert_allclose(found.scores, [[sum(long), short], [short, long[0]]], rtol=1e-5)
    assert index.search(["sail", "boat"], 1, exclude=np.array([[1, 0]])).label_ids.tolist() == [[1], [1]]
    assert index.search(["sail"], 1, exclude=np.empty((0, 2), int), allow=np.array([0])).label_ids.tolist() == [[0]]
