"""Labels by name or uid become label ids, and every name that cannot be resolved is an error with its row."""

from functools import partial

import pandas as pd
import pytest
from datasets import Dataset

from hf_xmc import XMCData, load_xmc
from hf_xmc.data.named import NamedRows, Vocabulary, assemble_named
from hf_xmc.data.vocabulary import MERGED

VOCABULARY = {"n1": ["boat", "vessel"], "n2": "car", "n3": "animal"}


def where(row):
    return f"books.csv:{row + 2}"


def rows(labels, scores=None):
    return NamedRows([f"text {number}" for number in range(len(labels))], labels, where, scores)


def assembled(labels, vocabulary=None, scores=None, **settings):
    given = None if vocabulary is None else Vocabulary.of(vocabulary)
    return XMCData.of_parts(assemble_named({"train": rows(labels, scores)}, given, **settings))


@pytest.mark.parametrize("form", ["names", "uids", "names and uids"])
def test_labels_are_found_by_name_and_by_uid(form):
    labels = {
        "names": [["vessel", "animal"], ["car"], [], ["boat"]],
        "uids": [["n1", "n3"], ["n2"], [], ["n1"]],
        "names and uids": [["n3", " vessel "], ["car"], None, ["n1"]],
    }
    data = assembled(labels[form], VOCABULARY)
    assert data.train["label_ids"][:] == [[0, 2], [1], [], [0]]
    assert data.labels["uid"][:] == ["n1", "n1", "n2", "n3"]
    assert data.labels["text"][:] == ["boat", "vessel", "car", "animal"]
    assert data.load_report["train: queries without labels"] == 1


def test_labels_count_in_order_of_first_appearance_train_first_without_a_vocabulary():
    splits = {"test": rows([["plane"], ["car"]]), "train": rows([["car", "boat"], ["animal"]])}
    data = XMCData.of_parts(assemble_named(splits))
    assert data.labels["uid"][:] == data.labels["text"][:] == ["car", "boat", "animal", "plane"]
    assert data.train["label_ids"][:] == [[0, 1], [2]]
    assert data.test["label_ids"][:] == [[3], [0]]


def test_names_that_white_space_alone_tells_apart_become_one_label_and_are_counted():
    splits = {"train": rows([["dialog", "menu"], ["dialog "]]), "test": rows([[" dialog", "menu"]])}
    data = XMCData.of_parts(assemble_named(splits))
    assert (data.labels["uid"][:], data.train["label_ids"][:]) == (["dialog", "menu"], [[0, 1], [0]])
    assert data.load_report == {MERGED: 2}
    data = assembled([["a"], ["b "]], {"a": "boat", "a ": "vessel", "b": "car"})
    assert data.labels["uid"][:] == ["a", "a", "b"]
    assert data.load_report[MERGED] == 1
    assert MERGED not in assembled([[" boat"], ["boat "], ["car"]], VOCABULARY).load_report


def test_merged_names_of_a_table_are_counted_but_white_space_after_a_separator_is_none(tmp_path):
    (tmp_path / "rows.csv").write_text("text,labels\na,dialog\nb,dialog \nc,menu\n")
    read = partial(load_xmc, tmp_path / "rows.csv", carve_missing=False)
    assert read(separator="").load_report == {MERGED: 1}
    (tmp_path / "rows.csv").write_text("text,labels\na,dialog; menu\nb,menu; dialog\n")
    assert read(separator=";").load_report == {}
    Dataset.from_dict({"uid": ["a", "a "], "text": ["boat", "vessel"]}).to_parquet(tmp_path / "labels.parquet")
    assert Vocabulary.read(tmp_path / "labels.parquet").load_report[MERGED] == 1


def test_two_labels_in_every_row_are_not_taken_for_flags():
    assert assembled([["a", "b"], ["b", "a"], ["b", "a"]]).train["label_ids"][:] == [[0, 1]] * 3
    data = assembled([["a", "b", "a"], ["b", "a", "b"]])
    assert data.train["label_ids"][:] == [[0, 1]] * 2
    assert data.load_report["train: repeated label of a query"] == 2


def test_scores_stay_with_their_labels():
    data = assembled([["car", "boat"], ["animal", "car"]], VOCABULARY, [[2, 1], [0, 3]])
    assert data.train["label_ids"][:] == [[0, 1], [1]]
    assert data.train["label_scores"][:] == [[1, 2], [3]]
    assert data.load_report["train: relevance 0, not a positive"] == 1
    with pytest.raises(
        ValueError, match=r"^books.csv:3: label_scores must be finite and at least 0, got -1.0 for label 1"
    ):
        assembled([["boat"], ["car"]], VOCABULARY, [[1], [-1]])
    with pytest.raises(
        ValueError, match=r"^books.csv:3: labels and scores must have the same length, got 1 labels and 2"
    ):
        assembled([["boat"], ["car"]], VOCABULARY, [[1], [1, 1]])


def test_an_unknown_label_is_an_error_that_names_row_and_nearest_name():
    with pytest.raises(
        ValueError,
        match=r"^books.csv:3: label 'vesel' is not in the vocabulary of 3 labels, and neither are 1 others. "
        r"Did you mean 'vessel'\? `unknown=\"drop\"` drops and counts such labels.$",
    ):
        assembled([["boat"], ["n2", "vesel"], ["plane", "vesel"]], VOCABULARY)


def test_unknown_labels_are_left_out_and_counted_on_request():
    data = assembled([["boat", "plane"], ["plane"], ["car"]], VOCABULARY, unknown="drop")
    assert data.train["label_ids"][:] == [[0], [], [1]]
    assert data.load_report["train: dropped labels that are not in the vocabulary"] == 2
    with pytest.raises(ValueError, match="`unknown` must be 'error' or 'drop', got 'keep'"):
        assembled([["boat"]], VOCABULARY, unknown="keep")


def test_a_name_of_two_labels_is_an_error_that_shows_both():
    twice = {"n1": ["bank", "shore"], "n2": ["bank", "lender"]}
    assert assembled([["shore"], ["lender"]], twice).train["label_ids"][:] == [[0], [1]]
    assert assembled([["n1"], ["n2"]], twice).train["label_ids"][:] == [[0], [1]]
    with pytest.raises(ValueError, match=r"^books.csv:3: label name 'bank' belongs to two labels .*, 'n1' and 'n2'"):
        assembled([["shore"], ["bank"]], twice)


def test_uids_go_before_texts_if_every_label_is_a_uid():
    crossed = {"1": "2", "2": "1"}
    assert assembled([["1"], ["2", "1"]], crossed).train["label_ids"][:] == [[0], [0, 1]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["boat", "car"], "^books.csv:2: labels must be a list of names, got the string 'boat'. Write `labels=\\["),
        (
            [["boat"], [3]],
            "^books.csv:3: a label must be a name or a uid, which are strings, got 3. If numbers",
        ),
        ([["boat"], 3], "^books.csv:3: labels must be a list of names, got 3"),
        ([["boat"], ["a", " "]], "^books.csv:3: a label must be a name or a uid, got ''"),
        ([["boat"], ["a\tb"]], r'^books.csv:3: a label must not contain a tab .* pass `separator="\\t"`'),
        ([[], []], "at least one row must have a label"),
    ],
)
def test_labels_of_another_form_are_refused_with_their_row(labels, message):
    with pytest.raises(ValueError, match=message):
        assembled(labels)


def test_texts_of_another_form_are_refused_with_their_row():
    with pytest.raises(ValueError, match=r"^books.csv:3: text must be a string, got None"):
        assemble_named({"train": NamedRows(["a", None], [["x"], ["y"]], where)})
    with pytest.raises(ValueError, match="train: texts and labels must have the same length, got 1 texts and 2 lists"):
        assemble_named({"train": NamedRows(["a"], [["x"], ["y"]], where)})
    with pytest.raises(ValueError, match="splits must be among train, validation, test, got dev"):
        assemble_named({"dev": rows([["x"]])})


@pytest.mark.parametrize(
    "labels",
    [
        {"n1": ["boat", "vessel"], "n2": ["car"], "n3": "animal"},
        pd.DataFrame({"uid": ["n1", "n2", "n1", "n3"], "text": ["boat", "car", "vessel", "animal"], "more": 1}),
        Dataset.from_dict({"text": ["boat", "car", "vessel", "animal"], "uid": ["n1", "n2", "n1", "n3"]}),
    ],
    ids=["dict", "frame", "dataset"],
)
def test_a_vocabulary_has_several_texts_of_a_label(labels):
    vocabulary = Vocabulary.of(labels)
    assert len(vocabulary) == 3
    assert vocabulary.label_ids(["vessel", "animal", "n2", "boat", "plane"]).tolist() == [0, 2, 1, 0, -1]


@pytest.mark.parametrize("name", ["labels.txt", "labels.jsonl"])
def test_a_vocabulary_is_read_from_a_file(name, tmp_path):
    content = {
        "labels.txt": "\ufeffboat\r\ncar \n\nred, blue\n",
        "labels.jsonl": '{"text": "boat", "uid": 1}\n{"text": "car", "uid": 2}\n{"text": "red, blue", "uid": 7}\n',
    }
    (tmp_path / name).write_text(content[name], encoding="utf-8", newline="")
    vocabulary = Vocabulary.of(tmp_path / name)
    assert vocabulary.labels["text"][:] == ["boat", "car", "red, blue"]
    assert vocabulary.labels["uid"][:] == (["1", "2", "7"] if "json" in name else ["boat", "car", "red, blue"])


def test_vocabularies_of_another_form_are_refused(tmp_path):
    for labels, message in [
        (["boat", "car", "boat"], r"got 'boat' at positions 0 and 2. `list\(dict.fromkeys\(names\)\)`"),
        (["boat", 3], "name 1 must be a string that is not empty, got 3. If these are label_ids"),
        (["boat", "n1\tcar"], r"name 1 must not contain a tab, got 'n1\\tcar'. .* pass a dict: {'n1': 'car', ...}"),
        ({1: "boat"}, r"uid 0 must be a string that is not empty, got 1. Convert numbers with `{str\(uid\): name"),
        ({"n1": []}, "must give label 'n1' a name or a list of names, got \\[\\]"),
        ({"n1": "boat", "n2": " "}, "text 1 must be a string that is not empty, got ''"),
        ([], "must have at least one label"),
        (3, "must be a list of names, a dict from uid to name, a Dataset or DataFrame .*, got a int"),
        (pd.DataFrame({"name": ["boat"]}), "must have a column text, got the columns name"),
        ("no/such.tsv", "must be an existing file, got 'no/such.tsv'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Vocabulary.of(labels)
