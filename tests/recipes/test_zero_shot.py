"""The zero-shot recipe: hidden labels, BM25 ranks and measurements, computed by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import dataset_layouts

from hf_xmc import Hierarchy, TopK, XMCData, XMCModel, static_encoder
from hf_xmc.metrics.calibration import expected_calibration_error

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


def test_labels_are_hidden_only_without_enough_new_ones(data):
    assert data.label_counts().tolist() == [1, 0, 2, 1]
    assert zero_shot.share_to_hide(data) == 0  # the car is 1 of 5 positives of test
    rest = zero_shot.with_labels(data, np.array([0, 2, 3]))
    assert zero_shot.share_to_hide(rest) == 0.1
    assert zero_shot.share_to_hide(zero_shot.replace(data, test=None, filter_pairs={})) == 0.1


def test_hidden_labels_follow_from_the_seed(data):
    drawn = [zero_shot.hidden_labels(data, 0.5, seed).tolist() for seed in range(20)]
    assert drawn == [zero_shot.hidden_labels(data, 0.5, seed).tolist() for seed in range(20)]
    assert all(len(one) == 2 and one == sorted(set(one)) for one in drawn)
    assert {label for one in drawn for label in one} == {0, 1, 2, 3}


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


def test_calibration_errors_worked_out_by_hand(data):
    queries = zero_shot.Queries.of(data, num_seen=2)
    best = TopK(np.array([[3, 1, -1], [1, 0, -1], [2, 1, 3]]), np.array([[0.9, 0.5, -np.inf], [1, 0, 0], [1, 1, 0]]))
    found = queries.errors(best)
    # Right are the label at 0.9, not that at 0.5, two of three at 1, and one of two at 0.
    assert found.mean == pytest.approx((0.1 + 0.5 + 1 + 1) / 7)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found == queries.errors(best)
    of_new = queries.probabilities_of(best, 2)  # tree is right, pet too, and the last tree is not
    assert of_new == {
        "number": 3,
        "probability": pytest.approx(1.9 / 3),
        "right": pytest.approx(2 / 3),
        "ECE": pytest.approx(0.1 / 3),
    }
    assert queries.probabilities_of(best, 4) == {"number": 0}


def test_calibration_errors_leave_out_queries_that_only_measure_rare_labels(data):
    queries = zero_shot.Queries.of(data, num_seen=2, number=1)
    best = TopK(np.array([[3], [3]]), np.array([[0.5], [0.5]]))
    assert queries.errors(best) == zero_shot.Error(0.5, 0.5, 0.5)  # tree is right for the first
    assert queries.probabilities_of(best, 2)["right"] == 1


SEEN = [f"seen{i} topic{i % 7}" for i in range(40)]
NEW = [f"fresh{i}" for i in range(30)]


def rows(numbers, words):
    texts = [f"about {SEEN[i]} {word}" for i in numbers for word in words]
    return Dataset.from_dict({"text": texts, "label_ids": [[i] for i in numbers for _ in words]})


@pytest.fixture(scope="module")
def reported():
    """A report on 30 new labels, of which each test query has one that it names, or the name of whose parent."""
    words = [f"word{k}" for k in range(6)]
    encoder = static_encoder([*SEEN, *NEW, "about", *words], embedding_dim=64, device="cpu")
    vectors = 5 * torch.from_numpy(encoder.encode_document(SEEN))
    labels = Dataset.from_dict({"uid": [f"S{i}" for i in range(40)], "text": SEEN, "seen": [True] * 40})
    model = XMCModel(encoder, labels, label_vectors=vectors)
    model.remember(rows(range(40), words[:2]))
    model.calibrate(rows(range(40), words[2:4]))
    uids = [*labels["uid"], *(f"N{i}" for i in range(30))]
    texts = [f"about fresh{i} word4" if i < 5 else f"about {SEEN[i]} word5" for i in range(30)]
    data = XMCData(
        train=rows(range(40), words[:2]),
        test=Dataset.from_dict({"text": texts, "label_ids": [[40 + i, i] for i in range(30)]}),
        labels=Dataset.from_dict({"uid": uids, "text": [*SEEN, *NEW]}),
    )
    hierarchy = Hierarchy({f"N{i}": [f"S{i}", "a uid that no label has"] for i in range(5, 30)})
    queries = zero_shot.Queries.of(data, 40)
    report = zero_shot.compared(model, data, 40, queries, {"untrained": encoder}, hierarchy, [5])
    return data, model, report


def test_new_labels_are_compared_in_every_system(reported):
    _, _, report = reported
    systems = report["systems"]
    assert set(systems) == {
        zero_shot.OURS,
        zero_shot.SCORES,
        zero_shot.PARENTS,
        zero_shot.ANCESTORS,
        "with 5 places reserved",
        "BM25",
        "untrained",
    }
    assert report["num_new"] == 30
    assert report["num_queries"] == {"rare new": 30, "new": 30, "seen": 30}
    assert report["rare_new_among_all"] == {"R@10": systems[zero_shot.OURS]["rare new R@10"]}
    assert report["bm25"]["rare_new_among_all"] == {"R@10": systems["BM25"]["rare new R@10"]}
    five = systems["with 5 places reserved"]
    for found in (systems[zero_shot.SCORES], five):
        assert {"area", "rare new R@10, alone"}.isdisjoint(found)
    assert five["new per text"] >= max(5, systems[zero_shot.OURS]["new per text"])
    assert five["seen P@5"] == systems[zero_shot.OURS]["seen P@5"]
    assert [name for name, found in systems.items() if "ECE@5" in found] == [
        zero_shot.OURS,
        "with 5 places reserved",
        zero_shot.PARENTS,
        zero_shot.ANCESTORS,
    ]
    lines = zero_shot.table(report).splitlines()
    assert len(lines) == 2 + len(systems)
    assert f"| {100 * systems[zero_shot.OURS]['ECE@5']:.2f} |" in lines[2]


def test_parents_find_labels_whose_own_words_no_query_has(reported):
    _, _, report = reported
    plain, parents = (report["systems"][name] for name in (zero_shot.OURS, zero_shot.PARENTS))
    assert plain["rare new R@10"] == pytest.approx(5 / 30, abs=0.1)
    assert parents["rare new R@10"] > 0.9
    assert report["systems"][zero_shot.ANCESTORS] == parents  # there is one generation


def test_reported_calibration_is_that_of_the_predictions(reported):
    data, model, report = reported
    model.remove_labels([f"N{i}" for i in range(30)])
    model.add_labels(data.labels.select(range(40, 70)))
    found = model.predict(data.test["text"][:], 10)
    positives = [{data.labels["uid"][one] for one in ids} for ids in data.test["label_ids"]]
    answers = [(one.score, one.uid in ids) for labels, ids in zip(found, positives, strict=True) for one in labels[:5]]
    error = expected_calibration_error(*map(np.array, zip(*answers, strict=True)))
    assert report["calibration"]["ECE@5"]["mean"] == pytest.approx(error)
    assert report["calibration"]["new labels in ten"]["number"] == sum(
        one.uid.startswith("N") for labels in found for one in labels
    )
    assert report["calibration"]["ECE@5"]["low"] < report["calibration"]["ECE@5"]["high"]


@pytest.mark.slow
def test_zero_shot_takes_labels_that_no_training_query_has(bert_folder, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    old = [(text, [one for one in ids if one != 4]) for text, ids in dataset_layouts.TRAIN]  # nothing is blue
    monkeypatch.setattr(dataset_layouts, "TRAIN", old)
    dataset_layouts.write_reference(tmp_path / "data")
    flags = ["--embedding_dim", "8", "--num_train_epochs", "1", "--validation_size", "0.3", "--use_cpu", "true"]
    where = ["--data", tmp_path / "data", "--output_dir", tmp_path / "zero_shot"]
    (tmp_path / "parents.tsv").write_text("4\t3\n")
    more = ["--encoders", bert_folder, "--encoder_length", "5", "--hierarchy", tmp_path / "parents.tsv"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["zero_shot.py", *where, *more, "--", *flags])))
    zero_shot.main()
    report = json.loads((tmp_path / "zero_shot" / "zero_shot.json").read_text())
    assert (report["num_new"], report["num_hidden"], report["num_seen"]) == (1, 0, 4)
    assert report["num_queries"]["rare new"] == 1
    assert {bert_folder.name, zero_shot.PARENTS, zero_shot.ANCESTORS} < set(report["systems"])
    assert zero_shot.pretrained(str(bert_folder), 5).max_seq_length == 5
    assert set(report["rare_new_among_all"]) == set(report["bm25"]["rare_new_among_all"]) == {"R@10"}
    model = XMCModel.from_pretrained(tmp_path / "zero_shot" / "model")
    assert sorted(model.labels["text"]) == ["animal", "boat", "car", "red"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["zero_shot.py", *where, "--share", "1"])))
    with pytest.raises(SystemExit, match="--share must leave some of the 5 labels"):
        zero_shot.main()


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
    assert (report["num_new"], report["num_hidden"], report["num_seen"]) == (2, 2, 3)
    assert {zero_shot.OURS, zero_shot.SCORES, "BM25", "the encoder before training"} == set(report["systems"])
    for metrics in report["systems"].values():
        assert all(0 <= value <= 1 for name, value in metrics.items() if name != "new per text")
    assert set(report["seen"]) == set(report["seen_without_new_labels"]) == {"P@1", "P@5"}
    for found in (report, report["bm25"]):
        assert set(found["rare_new_among_all"]) == {"R@10"}
    assert capsys.readouterr().out.count("| BM25 |") == 1
    model = XMCModel.from_pretrained(tmp_path / "zero_shot" / "model")
    assert len(model.labels) == 3  # the saved model does not know the hidden ones
