"""The comparison of the default with other systems on few texts."""

import json
import sys

import numpy as np
import pytest
from datasets import Dataset

from hf_xmc import XMCData

NAMES = ["boats", "cats", "dogs", "iron", "wool"]


@pytest.fixture
def small(script):
    return script("small_data")


@pytest.fixture
def data():
    def split(number, labels):
        ids = [[n % labels, (n + 1) % labels] for n in range(number)]
        return Dataset.from_dict(
            {"text": [f"about {NAMES[one]} and {NAMES[two]}" for one, two in ids], "label_ids": ids}
        )

    return XMCData(split(40, 5), Dataset.from_dict({"text": NAMES}), test=split(25, 5))


def test_a_draw_keeps_the_labels_of_its_texts_and_the_test_queries_that_have_one(small, data):
    drawn = small.draw(data, 1, 100, seed=3)
    (text,) = drawn.train["text"]
    names = drawn.labels["text"][:]
    assert text == f"about {names[0]} and {names[1]}" or text == f"about {names[1]} and {names[0]}"
    expected = [row for row in data.test["text"] if any(name in row for name in names)]
    assert drawn.test["text"][:] == expected
    for row, ids in zip(drawn.test["text"], drawn.test["label_ids"], strict=True):
        assert {names[label] for label in ids} == {name for name in names if name in row}
    fewer = small.draw(data, 1, 4, seed=3)
    assert len(fewer.test) == 4
    assert set(fewer.test["text"]) <= set(expected)


def test_the_labels_with_the_most_texts_are_kept_with_their_texts(small, data):
    ids = [[0], [0, 3], [3, 1], [3, 4], [4, 2], [1, 0], [0]]  # 0 and 3 have the most
    train = Dataset.from_dict({"text": [f"text {number}" for number in range(7)], "label_ids": ids})
    kept = small.frequent(XMCData(train, data.labels, test=data.test), 2)
    assert kept.labels["text"][:] == ["boats", "iron"]
    assert kept.train["text"][:] == [f"text {number}" for number in (0, 1, 2, 3, 5, 6)]
    assert kept.train["label_ids"][:] == [[0], [0, 1], [1], [1], [0], [0]]
    assert all("boats" in text or "iron" in text for text in kept.test["text"])
    assert len(kept.test) == 20  # four of five texts


def test_choices_are_made_on_queries_from_train(small, data):
    held = small.development(data)
    assert held.num_labels == 5
    assert len(held.test) == 8  # a tenth is 4, and all copies of a text stay together
    assert not set(held.train["text"]) & set(held.test["text"])
    assert sorted([*held.train["text"], *held.test["text"]]) == sorted(data.train["text"])
    own = XMCData(data.train, data.labels, validation=data.test, test=data.train)
    assert small.development(own).test["text"][:] == data.test["text"][:]


def test_metrics_and_their_means_are_those_that_a_hand_computes(small, data):
    first, second = (small.measure(data, np.tile(ids, (25, 1)), 3.0) for ids in ([0], [0, 1, 2, 3, 4]))
    assert first["P@1"] == second["P@1"] == 40.0  # two of five labels are right
    assert (first["P@5"], second["P@5"], second["R@10"]) == (8.0, 40.0, 100.0)
    runs = [{"texts": 9, "labels": 5, "systems": {"one": row}} for row in (first, second)]
    assert small.table(runs).splitlines()[-1].startswith("| 9 | 5 | one | 40.0 | 24.0 | ")


def test_all_systems_are_measured_on_the_same_texts(small, data, tmp_path, monkeypatch, capsys):
    data.save(tmp_path / "data")
    flags = ["--model", "static", "--embedding_dim", "8", "--num_train_epochs", "1"]
    out = ["--output_dir", str(tmp_path / "out"), "--sizes", "30", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["small_data.py", "--data", str(tmp_path / "data"), *out, "--", *flags])
    small.main()
    runs = json.loads((tmp_path / "out" / "small_data.json").read_text())
    assert [(run["texts"], run["seed"], [*run["systems"]][:2]) for run in runs] == [
        (30, seed, ["hf_xmc", "k-NN, tf-idf"]) for seed in (0, 1)
    ]
    assert "| 30 | 5 | hf_xmc | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["small_data.py", "--data", str(tmp_path / "data"), *out, "--sizes", "41"])
    with pytest.raises(SystemExit, match="--sizes must be at most the 40 training texts, got 41"):
        small.main()
