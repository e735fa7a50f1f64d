"""Filter pairs, and the labels of a repository, may be written as names, as uids or as numbers."""

import re

import numpy as np
import pandas as pd
import pytest

from hf_xmc import XMCData, load_xmc

PAIRS = {
    "names": [(0, "boat"), (1, "pet")],
    "uids": [(1, "n2"), (0, "n1"), (0, "n1")],
    "label ids": np.array([[0, 0], [1, 1]]),
}
VOCABULARY = {"n1": ["boat", "vessel"], "n2": "pet"}


@pytest.mark.parametrize("kind", PAIRS)
def test_filter_pairs_may_be_names_uids_or_label_ids(kind):
    test = ["a boat", "a pet"], [["vessel"], ["n2"]]
    data = XMCData.from_lists(["a sloop"], [["boat"]], VOCABULARY, test=test, filter_pairs={"test": PAIRS[kind]})
    assert data.filter_pairs["test"].tolist() == [[0, 0], [1, 1]]
    assert data.load_report.get("filter_pairs of test: repeated pairs", 0) == (kind == "uids")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, "ship")], "filter_pairs of test, pair 0: label 'ship' is not in the vocabulary of 2 labels"),
        ([(0, "boat"), (0, 1)], "labels must be all names or all label ids, got (0, 1)"),
        ([("0", "boat")], "pair 0: expected a row and a label, such as (0, 'boat'), got ('0', 'boat')"),
        ([(7, "boat")], "filter_pairs of test has row 7, label 0, but there are 1 rows and 2 labels"),
    ],
)
def test_wrong_filter_pairs_are_named(pairs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        XMCData.from_lists(["a"], [["boat"]], VOCABULARY, test=(["b"], [["pet"]]), filter_pairs={"test": pairs})


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_a_folder_of_names_may_have_filter_pairs(suffix, tmp_path):
    (tmp_path / "train.csv").write_text("text,labels\na sloop,boat\na cat,pet\n")
    (tmp_path / "test.csv").write_text("text,labels\na boat,boat\na pet,pet\n")
    frame, path = pd.DataFrame({"row": [1, 0], "label": ["pet", "boat"]}), tmp_path / f"filter_pairs{suffix}"
    if suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    assert load_xmc(tmp_path).filter_pairs["test"].tolist() == [[0, 0], [1, 1]]


CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: queries.parquet}, {split: test, path: others.parquet}]
- config_name: labels
  data_files: vocabulary.parquet
- config_name: filter_pairs
  data_files: [{split: test, path: pairs.parquet}]
---
"""


def test_a_repository_may_have_names_uids_and_filter_pairs_by_name(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    labels = pd.DataFrame({"uid": ["n1", "n1", "n2"], "text": ["boat", "vessel", "pet"]})
    labels.to_parquet(tmp_path / "vocabulary.parquet")
    queries = pd.DataFrame({"text": ["a sloop", "a cat"], "labels": [["vessel"], ["pet", "n1"]]})
    queries.to_parquet(tmp_path / "queries.parquet")
    queries.assign(label_scores=[[0.5], [1.0, 2.0]]).to_parquet(tmp_path / "others.parquet")
    pd.DataFrame({"row": [1], "label": ["boat"]}).to_parquet(tmp_path / "pairs.parquet")
    data = load_xmc(tmp_path)
    assert data.train["label_ids"][:] == [[0], [0, 1]]
    assert data.test["label_scores"][:] == [[0.5], [2.0, 1.0]]
    assert data.filter_pairs["test"].tolist() == [[1, 0]]
    queries.assign(labels=[["ship"], []]).to_parquet(tmp_path / "queries.parquet")
    with pytest.raises(ValueError, match="train, row 0: label 'ship' is not in the vocabulary of 2 labels"):
        load_xmc(tmp_path)
