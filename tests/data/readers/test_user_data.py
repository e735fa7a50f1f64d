"""Tables as users' tools write them: texts and label names go in, with a line for everything that is wrong."""

import json
import logging

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from helpers import dataset_layouts

from hf_xmc import XMCData, carve, load_xmc

FRAME = pd.DataFrame(
    {
        "id": ["007", "008", "009", "010"],
        "title": ['The "Sloop", fast', "Two\nlines", None, "Händler"],
        "abstract": ["about boats", None, "a cat; a dog", "trade, ports"],
        "subjects": ["boats; ships", "", "pets", "ports;boats;"],
    }
)
TEXTS = ['The "Sloop", fast about boats', "Two\nlines", "a cat; a dog", "Händler trade, ports"]
IDS = [[0, 1], [], [2], [0, 3]]
COLUMNS = {"text": ["title", "abstract"], "labels": "subjects", "separator": ";"}
WRITERS = {
    "csv": ("books.csv", lambda path: FRAME.to_csv(path, index=False), {}),
    "csv with an index": ("books.csv", FRAME.to_csv, {}),
    "semicolons": ("books.csv", lambda path: FRAME.to_csv(path, index=False, sep=";"), {}),
    "byte order mark": ("books.csv", lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig"), {}),
    "unicode text of a spreadsheet": (
        "books.tsv",
        lambda path: FRAME.to_csv(path, index=False, sep="\t", encoding="utf-16", lineterminator="\r\n"),
        {},
    ),
    "declared separator": (
        "books.csv",
        lambda path: path.write_text("sep=|\r\n" + FRAME.to_csv(index=False, sep="|"), encoding="utf-8"),
        {},
    ),
    "latin-1": (
        "books.csv",
        lambda path: FRAME.to_csv(path, index=False, encoding="latin-1"),
        {"encoding": "latin-1"},
    ),
    "tsv": ("books.tsv", lambda path: FRAME.to_csv(path, index=False, sep="\t"), {}),
    "jsonl": ("books.jsonl", lambda path: FRAME.to_json(path, orient="records", lines=True), {}),
    "parquet": ("books.parquet", FRAME.to_parquet, {}),
}


@pytest.mark.parametrize("form", WRITERS)
def test_a_table_of_texts_and_names_loads_as_it_was_written(form, tmp_path):
    name, write, settings = WRITERS[form]
    write(tmp_path / name)
    data = load_xmc(tmp_path / name, **COLUMNS, **settings)
    assert data.train["text"][:] == TEXTS
    assert data.train["label_ids"][:] == IDS
    assert data.labels["text"][:] == ["boats", "ships", "pets", "ports"]


def test_digits_stay_as_they_are_written(tmp_path):
    pd.DataFrame({"text": ["a", "b"], "labels": ["007", "7"]}).to_csv(tmp_path / "rows.csv", index=False)
    data = load_xmc(tmp_path / "rows.csv")
    assert data.labels["uid"][:] == ["007", "7"]
    assert data.train["label_ids"][:] == [[0], [1]]


def test_a_vocabulary_file_gives_the_labels_their_order_and_texts(tmp_path):
    FRAME.to_csv(tmp_path / "books.csv", index=False)
    labels = pd.DataFrame({"uid": ["s1", "s2", "s2", "s3", "s4"], "text": ["pets", "boats", "ships", "ports", "toys"]})
    labels.to_csv(tmp_path / "subjects.tsv", index=False, sep="\t")
    data = load_xmc(tmp_path / "books.csv", **COLUMNS, vocabulary=tmp_path / "subjects.tsv")
    assert data.train["label_ids"][:] == [[1], [], [0], [1, 2]]
    assert data.num_labels == 4
    assert data.load_report["train: repeated label of a query"] == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_of_tables_has_its_splits_and_vocabulary(suffix, tmp_path):
    labels = pd.DataFrame({"uid": ["s1", "s2"], "text": ["boats", "pets"]})
    tables = {"labels": labels}
    for name, subject in (("train", "boats"), ("validation", "s2"), ("test", "pets")):
        tables[name] = pd.DataFrame({"text": [f"about {subject}"], "labels": [subject]})
    for name, table in tables.items():
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".csv":
            table.to_csv(path, index=False)
        elif suffix == ".jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_parquet(path)
    data = load_xmc(tmp_path)
    assert [data.split(name)["label_ids"][:] for name in ("train", "validation", "test")] == [[[0]], [[1]], [[1]]]
    assert data.labels["uid"][:] == ["s1", "s2"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_may_be_gzipped(suffix, tmp_path):
    tables = {"train": [["a sloop", "boats"], ["a\ncat", "pets"]], "test": [["a dog", "pets"]]}
    for name, rows in tables.items():
        frame = pd.DataFrame(rows, columns=["text", "labels"])
        path = tmp_path / f"{name}{suffix}.gz"
        if suffix == ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    data = load_xmc(tmp_path)
    assert data.train["text"][:] == ["a sloop", "a\ncat"]
    assert data.test["label_ids"][:] == [[1]]
    alone = load_xmc(tmp_path / f"train{suffix}.gz")
    assert alone.train["text"][:] == data.train["text"][:]
    (tmp_path / f"train{suffix}.gz").write_bytes((tmp_path / f"train{suffix}.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train.*damaged or truncated"):
        load_xmc(tmp_path / f"train{suffix}.gz")


def test_lists_and_scores_in_json_lines_go_with_their_names(tmp_path):
    rows = [{"text": "a", "labels": ["x", "y"], "label_scores": [1, 3]}]
    rows.append({"text": "b", "labels": [], "label_scores": []})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_xmc(tmp_path / "rows.jsonl")
    assert data.train["label_scores"][:] == [[1, 3], []]


def test_a_guess_is_logged(tmp_path, caplog):
    pd.DataFrame({"text": ["a"], "labels": ["x"]}).to_csv(tmp_path / "rows.csv", index=False)
    with caplog.at_level(logging.INFO, "hf_xmc"):
        load_xmc(tmp_path / "rows.csv")
    assert "reading text and labels from the columns with these names" in caplog.text
    assert "reading each cell as the name of one label" in caplog.text
    assert "Took no test or validation split from only 1 training queries" in caplog.text


WRONG = {
    "columns that are not named": (
        "title,subjects\na,b\n",
        {},
        r"are title, subjects. .*`load_xmc\('.*/rows.csv', text='title', labels='subjects'\)`",
    ),
    "a column that is not there": (
        "title,subjects\na,b\n",
        {"text": "name", "labels": "subjects"},
        "has no column 'name', named in `text`; its columns are title, subjects",
    ),
    "a column that is there twice": ("text,labels,text\na,b,c\n", {}, "has two columns 'text'"),
    "names with a separator that is not given": (
        "text,labels\na,b\nb,c;d\n",
        {},
        r"rows.csv:3: labels in column 'labels' are 'c;d'. .* Pass `separator=';'`",
    ),
    "lists written as text": (
        "text,labels\na,\"['b', 'c']\"\n",
        {},
        r"rows.csv:2: labels .* are a list written as text",
    ),
    "a cell too many": (
        "text,labels\na,b\nb,c,d\n",
        {},
        r"rows.csv:3: expected 2 cells, got 3. Put cells that contain ',' or a line break in double quotes",
    ),
    "a quote that is not closed": (
        'text,labels\na,b\nb,"c\nd,e\nf,g\n',
        {},
        r"rows.csv:3: not valid CSV \(unexpected end of data\). Is the quote of a cell not closed\?",
    ),
    "another encoding": (
        "text,labels\na,b\nä,b\n".encode("latin-1"),
        {},
        r"rows.csv:3: byte 0 of the line is not UTF-8. .*encoding='latin-1'",
    ),
    "an encoding that does not exist": (
        "text,labels\na,b\n",
        {"encoding": "latin1-x"},
        "`encoding` must be a name such as",
    ),
    "an unknown label behind a line break": (
        'text,labels\n"a\nb",x\nc,boat\n',
        {"vocabulary": ["x", "boats"]},
        r"rows.csv:4: label 'boat' is not in the vocabulary of 2 labels. Did you mean 'boats'\?",
    ),
    "no header": ("", {}, "must have the names of the columns in its first line"),
    "no rows with labels": ("text,labels\na,\n", {}, "at least one row must have a label"),
    "a revision": ("text,labels\na,b\n", {"revision": "main"}, "`revision` must be None"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_of_a_table_is_named_with_its_line(fault, tmp_path):
    content, settings, message = WRONG[fault]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_xmc(tmp_path / "rows.csv", **settings)


def test_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"must be a table in one of these formats: .csv, .csv.gz, .tsv, .*, .parquet"):
        load_xmc(tmp_path / "rows.xlsx")
    with pytest.raises(
        ValueError, match=r"the file 'org/books' does not exist, .*`XMCData.from_dataset\(datasets.load_data"
    ):
        load_xmc("org/books", text="title")


def test_an_argument_that_would_be_ignored_is_refused(tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    with pytest.raises(ValueError, match=r"`encoding` must be 'utf-8', got 'latin-1', because .* is neither a CSV"):
        load_xmc(tmp_path, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"`unknown` must be 'error', got 'drop', because the labels of .* are numbers"
    ):
        load_xmc(tmp_path, unknown="drop")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "labels": ["x"]}')
    with pytest.raises(ValueError, match="`encoding` must be 'utf-8', got 'latin-1'"):
        load_xmc(tmp_path / "rows.jsonl", encoding="latin-1")


def test_missing_splits_are_carved_and_kept_in_the_prepared_data(tmp_path):
    frame = pd.DataFrame(
        {"text": [f"text {n}" for n in range(1000)], "labels": [f"label {n % 7}" for n in range(1000)]}
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    data = load_xmc(tmp_path / "rows.csv")
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [850, 50, 100]
    assert data.load_report["validation: queries taken from train, seed 0"] == 50
    assert data.load_report["test: queries taken from train, seed 0"] == 100
    data.save(tmp_path / "prepared")
    again = load_xmc(tmp_path / "prepared")
    assert again.test["text"][:] == data.test["text"][:]
    assert again.load_report == data.load_report
    frame[::-1].to_csv(tmp_path / "rows.csv", index=False)
    assert set(load_xmc(tmp_path / "rows.csv").test["text"]) == set(data.test["text"])
    whole = load_xmc(tmp_path / "rows.csv", carve_missing=False)
    assert (len(whole.train), whole.validation, whole.test) == (1000, None, None)
    assert set(carve(whole, seed=1).test["text"]) != set(data.test["text"])
    assert (
        carve(whole, validation=0.05, test=None).validation["text"][:] == whole.carve_validation().validation["text"][:]
    )
    assert carve(data) == data


LISTED = pd.DataFrame({"text": ["a", "b", "c"], "labels": [["x"], None, ["y", "x"]]})
FLAGGED = pd.DataFrame(
    {"text": ["a", "b", "c"], "x": [1, 0, 1], "y": [False, False, True], "z": [0.0, 0.0, float("nan")]}
)


@pytest.mark.parametrize(
    ("frame", "settings"),
    [
        (LISTED, {}),
        (LISTED.assign(labels=[{"x"}, float("nan"), ("x", "y")]), {}),
        (LISTED.assign(labels=["x", None, "y|x"]), {"separator": "|"}),
        (LISTED.assign(labels=["x", None, "y|x"]).astype("string"), {"separator": "|"}),
        (FLAGGED, {"labels": ["x", "y", "z"]}),
    ],
    ids=["lists", "sets", "strings", "string type", "flags"],
)
def test_a_frame_gives_the_same_data_in_every_form_of_labels(frame, settings):
    data = XMCData.from_pandas(frame, **settings)
    assert data.train["label_ids"][:] == [[0], [], [0, 1]]
    assert data.labels["uid"][:] == (["x", "y", "z"] if "labels" in settings else ["x", "y"])


def test_frames_of_other_splits_share_the_labels():
    data = XMCData.from_pandas(LISTED, test=LISTED.assign(labels=[["z"], ["y"], ["x"]]))
    assert data.test["label_ids"][:] == [[2], [1], [0]]


def test_class_labels_of_a_dataset_keep_their_names_and_order():
    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["x", "y", "z"]))})
    dataset = Dataset.from_dict({"text": ["a", "b"], "labels": [[2, 0], []]}, features=features)
    data = XMCData.from_dataset(DatasetDict(train=dataset, test=dataset.select([1, 0])))
    assert data.train["label_ids"][:] == [[0, 2], []]
    assert data.test["label_ids"][:] == [[], [0, 2]]
    assert data.labels["uid"][:] == ["x", "y", "z"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x;1", "y"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 0]}, features=features)
    assert XMCData.from_dataset(dataset, labels="label").train["label_ids"][:] == [[1], [], [0]]


def test_names_of_a_dataset_are_found_in_the_vocabulary():
    dataset = Dataset.from_pandas(LISTED)
    data = XMCData.from_dataset(dataset, vocabulary={"n1": "y", "n2": "x"})
    assert data.train["label_ids"][:] == [[1], [], [0, 1]]
    with pytest.raises(ValueError, match=r"splits must be train and .*, got dev. Write .*\"train\": dataset\['dev'\]"):
        XMCData.from_dataset(DatasetDict(dev=dataset))


def test_lists_give_their_splits():
    data = XMCData.from_lists(["a", "b"], [["x"], ["y", "x"]], test=(["c"], [["y"]]), vocabulary=["y", "x"])
    assert data.train["label_ids"][:] == [[1], [0, 1]]
    assert data.test["label_ids"][:] == [[0]]
