"""The zero-shot recipe: hidden labels, BM25 ranks and measurements, computed by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import dataset_layouts

from hf_xmc import TopK, XMCData, XMCModel

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import zero_shot

NAMES = ["boat", "car", "pet", "tree"]


@pytest.fixture
def data():
    return XMCData(
        train=Dataset.from_dict({"text": ["a", "b", "c"], "label_ids": [[0, 2], [2], [3]]}),
        test=Dataset.from_dict({"text": ["d", "e", "f"], "label_ids": [[2, 3], [0], [1, 2]]}),
        labels=Dataset.from_dict({"uid": NAMES, "text": NAMES}),
        filter_pairs={"train": np.array([[0, 0], [1, 2], [2, 3]]), "test": np.array([[0, 1], [2, 0]])},
    )


def test_hidden_labels_leave_no_trace(data):
    known = zero_shot.with_labels(data, np.array([3, 0]))  # and these two change places
    assert list(known.labels["text"]) == ["tree", "boat"]
    assert known.train[:] == {"text": ["a", "c"], "label_ids": [[1], [0]]}
    assert known.test[:] == {"text": ["d", "e", "f"], "label_ids": [[0], [1], []]}
    assert known.filter_pairs["train"].tolist() == [[0, 1], [1, 0]]
    assert known.filter_pairs["test"].tolist() == [[2, 1]]


def top(rows):
    label_ids = np.array(rows)
    return TopK(label_ids, np.where(label_ids < 0, -np.inf, -np.arange(label_ids.shape[1], dtype=float)))


def test_hidden_and_seen_labels_are_measured_among_all(data):
    queries = zero_shot.Queries.of(data, num_seen=2)  # pet and tree are hidden, and rare
    assert queries.excluded.tolist() == [[0, 1], [2, 0]]
    assert queries.numbers(2) == {"rare new": 2, "new": 2, "seen": 2}
    padding = [-1] * 7
    best = top([[2, 0, 1, *padding], [0, 1, -1, *padding], [3, 1, -1, *padding]])
    seen, new = top([[0, 1, -1, *padding]] * 3), top([[2, 3, -1, *padding]] * 3)
    found = queries.figures(seen, new, best, 2)
    assert (found["rare new R@10"], found["new R@10"]) == (0.25, 0.25)  # 1 of 2, and none of 1
    assert (found["seen P@1"], found["seen P@5"], found["seen R@10"]) == (0.5, 0.2, 1)
    assert found["harmonic mean"] == pytest.approx(2 * 0.25 / 1.25)
    assert (found["rare new R@10, alone"], found["new per text"]) == (1, 2 / 3)
    assert found["area"] == 1  # there are places for all


def test_a_bonus_moves_new_labels_up():
    seen, new = top([[0, 1, *[-1] * 8]] * 3), top([[2, 3, *[-1] * 8]] * 3)
    assert zero_shot.merged(seen, new, -np.inf).label_ids[0, :4].tolist() == [0, 1, 2, 3]
    assert zero_shot.merged(seen, new, np.inf).label_ids[0, :4].tolist() == [2, 3, 0, 1]
    assert zero_shot.merged(seen, new, 0.5).label_ids[0, :4].tolist() == [2, 0, 3, 1]


def test_some_queries_are_measured_and_all_with_a_rare_new_label(data):
    queries = zero_shot.Queries.of(data, num_seen=3, number=1)  # tree is hidden
    assert queries.texts == ["d"]
    queries = zero_shot.Queries.of(data, num_seen=2, number=1)
    assert (queries.texts, queries.measured.tolist()) == (["d", "f"], [True, False])
    assert queries.excluded.tolist() == [[0, 1], [1, 0]]


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


@pytest.mark.slow
def test_zero_shot_adds_hidden_labels_by_text_and_measures_them(capsys, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_reference(tmp_path / "data")
    flags = ["--embedding_dim", "8", "--num_train_epochs", "2", "--validation_size", "0.3", "--use_cpu", "true"]
    where = ["--data", tmp_path / "data", "--output_dir", tmp_path / "zero_shot"]
    command = ["zero_shot.py", *where, "--share", "0.4", "--", *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    zero_shot.main()
    report = json.loads((tmp_path / "zero_shot" / "zero_shot.json").read_text())
    assert (report["num_hidden"], report["num_seen"]) == (2, 3)
    assert {zero_shot.OURS, zero_shot.SCORES, "BM25", "the encoder before training"} == set(report["systems"])
    for metrics in report["systems"].values():
        assert all(0 <= value <= 1 for name, value in metrics.items() if name != "new per text")
    assert set(report["seen"]) == set(report["seen_without_new_labels"]) == {"P@1", "P@5"}
    for found in (report, report["bm25"]):
        assert set(found["rare_new_among_all"]) == {"R@10"}
    assert capsys.readouterr().out.count("| BM25 |") == 1
    model = XMCModel.from_pretrained(tmp_path / "zero_shot" / "model")
    assert len(model.labels) == 3  # the saved model does not know the hidden ones
