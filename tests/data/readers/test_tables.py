"""Tables, in a folder or a repository: bad rows and columns are an error with file and line, or split and row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers import dataset_layouts

from hf_xmc import load_xmc


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("train", {"text": "x", "label_ids": [9]}, "train, row 7: label id 9"),
        ("train", {"text": "x", "label_ids": [-1]}, "train, row 7: label id -1"),
        (
            "train",
            {"text": "x", "label_ids": [0.5]},
            r"train.jsonl:8: label_ids must be a list of numbers, got \[0.5\]",
        ),
        (
            "train",
            {"text": "x", "label_ids": [None]},
            r"train.jsonl:8: label_ids must be a list of numbers, got \[None\]",
        ),
        ("train", {"text": "x", "label_ids": [2**70]}, r"train.jsonl:1: here, or in the next 7 lines"),
        ("train", {"text": "\ud800", "label_ids": [0]}, r"train.jsonl:1: here, or in the next 7 lines"),
        ("train", {"text": ["x"], "label_ids": [0]}, r"train.jsonl:8: text must be a string, got \['x'\]"),
        (
            "train",
            {"text": "x", "label_ids": [0], "label_scores": [2]},
            "jsonl:8: the first line must have all columns, but label_scores",
        ),
        ("train", {"text": "x", "label_ids": 0}, r"train.jsonl:8: label_ids must be a list of numbers, got 0"),
        ("train", {"text": None, "label_ids": [1]}, "train, row 7: no text"),
        ("train", {"text": "x", "label_ids": None}, "train, row 7: no label_ids"),
        ("filter_pairs", {"row": 0, "label": 9}, "filter_pairs of test has row 0, label 9"),
        ("filter_pairs", {"row": 3, "label": 0}, "filter_pairs of test has row 3, label 0, but there are 3 rows"),
        ("filter_pairs", {"row": -1, "label": 0}, "filter_pairs of test has row -1, label 0"),
        ("filter_pairs", {"row": 0, "label": -1}, "filter_pairs of test has row 0, label -1"),
        ("filter_pairs", {"row": 0.5, "label": 0}, "filter_pairs of test: expected whole numbers"),
        ("filter_pairs", {"row": 0, "label": None}, "filter_pairs of test: expected whole numbers"),
        ("filter_pairs", {"row": [0], "label": 0}, r"filter_pairs.jsonl:1: here, or in the next 2 lines"),
        ("labels", {"uid": None, "text": "x"}, "labels, row 5: the uid is missing"),
    ],
)
def test_a_bad_row_of_a_table_is_refused_with_its_place(tmp_path, name, row, message):
    dataset_layouts.write_jsonl(tmp_path)
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        load_xmc(tmp_path)


@pytest.mark.parametrize("scores", [0.5, "0.5", ["0.5"], ["x"], [[0.5]], [{}], [True], [None]])
def test_scores_that_are_not_numbers_are_refused(scores, tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    dataset_layouts.write_lines(
        tmp_path / "train.jsonl",
        [json.dumps({"text": "x", "label_ids": [0], "label_scores": given}) for given in ([1], [0.5], scores)],
    )
    with pytest.raises(ValueError, match=r"train.jsonl:3: label_scores must be a list of numbers, got .*"):
        load_xmc(tmp_path)


def test_missing_and_unequal_columns_are_refused(tmp_path):
    dataset_layouts.write_parquet(tmp_path)
    Dataset.from_dict({"sentence": ["x"], "label_ids": [[0]]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train: there is no column text, only sentence, label_ids"):
        load_xmc(tmp_path)
    Dataset.from_dict({"text": ["x"], "label_ids": [[0, 1]], "label_scores": [[1.0]]}).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(
        ValueError, match="train, row 0: label_ids and label_scores must have the same length and order"
    ):
        load_xmc(tmp_path)
    del_column(tmp_path / "labels.parquet", "text")
    dataset_layouts.tables()["train"].to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="labels: there is no column text, only uid"):
        load_xmc(tmp_path)
    dataset_layouts.tables()["labels"].to_parquet(tmp_path / "labels.parquet")
    del_column(tmp_path / "filter_pairs.parquet", "row")
    with pytest.raises(ValueError, match="filter_pairs: there is no column row, only label"):
        load_xmc(tmp_path)


def del_column(path, name):
    table = pq.read_table(path).drop_columns(name)
    path.unlink()  # the old table may be mapped still
    pq.write_table(table, path)


def test_missing_tables_are_refused(tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="filter_pairs of test has row 0, label 0, but there are 0 rows"):
        load_xmc(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has a labels table, but train.jsonl or train.parquet is missing"):
        load_xmc(tmp_path)


def test_a_pair_named_again_is_counted(tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    with (tmp_path / "filter_pairs.jsonl").open("a") as file:
        file.write('{"row": 1, "label": 2}\n')
    data = load_xmc(tmp_path)
    assert data.filter_pairs["test"].tolist() == dataset_layouts.FILTER_PAIRS
    assert data.load_report["filter_pairs of test: repeated pairs"] == 1


def test_tables_of_many_batches_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.data.readers.formats.ROWS_A_BATCH", 3)
    dataset_layouts.write_jsonl(tmp_path)
    data = load_xmc(tmp_path)
    assert [row["text"] for row in data.train] == [text for text, _ in dataset_layouts.TRAIN]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "\\ud800", "label_ids": []}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:7: here, or in the next 1 lines"):
        load_xmc(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1], "label_ids": [[0]]}, "train, row 0: text must be a string, got int64"),
        ({"text": ["x", "y"], "label_ids": [[0], [1, None]]}, "train, row 1: a label id is missing"),
        ({"text": ["x"], "label_ids": [[0.5]]}, "train, row 0: label_ids must be integers, got double"),
        ({"text": ["x"], "label_ids": [0]}, "train, row 0: label_ids must be a list of numbers, got int64"),
        ({"text": ["x"], "label_ids": pa.nulls(1)}, "train, row 0: no label_ids"),
        (
            {"text": ["x"], "label_ids": [[0]], "label_scores": [1]},
            "train, row 0: label_scores must be a list of numbers, got int64",
        ),
        (
            {"text": ["x"], "label_ids": [[0]], "label_scores": [["1"]]},
            "train, row 0: label_scores must be numbers, got string",
        ),
        (
            {"text": ["x"], "label_ids": [[0]], "label_scores": [[True]]},
            "train, row 0: label_scores must be numbers, got bool",
        ),
        ({"text": ["x"], "label_ids": pa.array([[(0, 1)]], pa.map_(pa.int8(), pa.int8()))}, "parquet: not a readable"),
        ({"text": pa.array(["x"], pa.large_string()), "label_ids": [[0]]}, None),
        ({"text": pa.array(["x"], pa.string_view()), "label_ids": [[0]]}, None),
        (
            {"text": ["x"]},
            "train: there is no column label_ids, only text. If the labels .* are unknown, give each an empty",
        ),
        ({"text": ["x"], "label_ids": [[0]], "label_scores": pa.array([[1]], pa.list_(pa.decimal128(3)))}, None),
    ],
)
def test_columns_are_read_or_refused_by_their_type(columns, message, tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    if message is None:
        assert load_xmc(tmp_path).train[0] == {"text": "x", "label_ids": [0]}
        return
    with pytest.raises(ValueError, match=message):
        load_xmc(tmp_path)


@pytest.mark.parametrize("damage", ["no parquet", "garbled"])
def test_a_damaged_parquet_file_is_refused(damage, tmp_path):
    dataset_layouts.write_parquet(tmp_path)
    path = tmp_path / "train.parquet"
    content = bytearray(path.read_bytes())
    content[10:60] = b"\xff" * 50
    path.unlink()
    path.write_bytes(content if damage == "garbled" else b"x" * 50)
    with pytest.raises(ValueError, match=r"train\.parquet: not a readable table"):
        load_xmc(tmp_path)


@pytest.mark.parametrize("name", ["labels", "train", "filter_pairs"])
def test_blank_lines_may_end_a_table_but_not_interrupt_it(name, tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    path = tmp_path / f"{name}.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + b"\r\n \n")
    data = load_xmc(tmp_path)
    assert (len(data.labels), len(data.train)) == (5, 7)
    assert data.filter_pairs["test"].tolist() == dataset_layouts.FILTER_PAIRS
    path.write_bytes(content.replace(b"\n", b"\n\n", 1))  # a lost row would move the numbers of all that follow
    with pytest.raises(ValueError, match=rf"{name}\.jsonl:2: not valid JSON \(a blank line"):
        load_xmc(tmp_path)


@pytest.mark.parametrize("name", ["labels", "train", "test", "filter_pairs"])
def test_an_empty_file_is_refused(name, tmp_path):
    dataset_layouts.write_jsonl(tmp_path)
    (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(ValueError, match=rf"{name}\.jsonl is empty\. Remove the file if there is no such table"):
        load_xmc(tmp_path)


def test_a_repository_of_other_configs_or_splits_is_refused(tmp_path):
    dataset_layouts.write_hub(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace("split: train", "split: dev"))
    with pytest.raises(ValueError, match="splits must be among train, validation, test, got 'dev'"):
        load_xmc(tmp_path)
    (tmp_path / "README.md").write_text(card.replace("config_name: labels", "config_name: names"))
    with pytest.raises(ValueError, match=r"must have the configs `default` \(queries\) and `labels`"):
        load_xmc(tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "org/data"])
def test_a_name_that_does_not_exist_is_refused(name, monkeypatch):
    """The first can be no repository; the second is not in the cache."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"'{name}' is neither a folder here nor a data set of the Hub in reach"):
        load_xmc(name)


OTHERS = {
    "another type at the end": lambda row: "n.d." if row == 6 else 1999,
    "objects of different keys": lambda row: {f"key {row}": [row]},
    "lists within lists": lambda row: [[row]] if row % 2 else row,
    "nothing": lambda row: None,
    "large numbers": lambda row: 10 ** (10 * row),
    "half a surrogate pair": lambda row: "\ud800",
}


def with_column(folder, name, value, path=None):
    """Add a column to a table of JSON lines."""
    path = path or folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    dataset_layouts.write_lines(path, [json.dumps({"other": value(row), **record}) for row, record in enumerate(rows)])


@pytest.mark.parametrize("case", OTHERS)
def test_unused_columns_of_json_lines_may_hold_anything(case, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.data.readers.formats.ROWS_A_BATCH", 3)
    dataset_layouts.write_jsonl(tmp_path)
    for name in ("labels", "train", "test", "filter_pairs"):
        with_column(tmp_path, name, OTHERS[case])
    data = load_xmc(tmp_path)
    assert [(row["text"], row["label_ids"]) for row in data.train] == dataset_layouts.TRAIN
    assert data.filter_pairs["test"].tolist() == dataset_layouts.FILTER_PAIRS
    assert data.train.column_names == ["text", "label_ids"]


def test_a_column_whose_type_changes_between_batches_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.data.readers.formats.ROWS_A_BATCH", 2)
    dataset_layouts.write_jsonl(tmp_path)
    ids = ["a", "b", "c", 3, 4]
    dataset_layouts.write_lines(tmp_path / "labels.jsonl", [json.dumps({"uid": i, "text": f"t{i}"}) for i in ids])
    with pytest.raises(ValueError, match=r"labels\.jsonl:4: uids must all be strings or all be numbers, got 3"):
        load_xmc(tmp_path)
    dataset_layouts.write_lines(tmp_path / "labels.jsonl", ['{"uid": {"a": 1}, "text": "t"}'])
    with pytest.raises(ValueError, match=r"labels\.jsonl:1: uid must be a string, got \{'a': 1\}"):
        load_xmc(tmp_path)


STRANGE = {
    "map": pa.array([[(0, 1)]] * 7, pa.map_(pa.int8(), pa.int8())),
    "struct": pa.array([{"a": 1}] * 7),
    "null": pa.nulls(7),
    "dictionary": pa.array(["a"] * 7).dictionary_encode(),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("hub", [False, True])
def test_unused_columns_of_parquet_may_hold_anything(case, hub, tmp_path):
    (dataset_layouts.write_hub if hub else dataset_layouts.write_parquet)(tmp_path)
    path = tmp_path / "data" / "train.parquet" if hub else tmp_path / "train.parquet"
    table = pq.read_table(path, memory_map=False)
    path.unlink()
    pq.write_table(table.append_column("other", STRANGE[case]).append_column("text.en", table["text"]), path)
    data = load_xmc(tmp_path)
    assert data.train["text"][:] == [text for text, _ in dataset_layouts.TRAIN]
    assert data.train.column_names == ["text", "label_ids"]


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("array", [False, True])
def test_unused_columns_of_a_json_repository_may_hold_anything(case, array, tmp_path):
    """One object per line, or all in an array."""
    dataset_layouts.write_hub(tmp_path)
    for name, table in dataset_layouts.tables().items():
        rows = [json.dumps({**row, "other": OTHERS[case](number)}) for number, row in enumerate(table)]
        path = tmp_path / "data" / f"{name}.{'json' if array else 'jsonl'}"
        path.write_text(f"[{', '.join(rows)}]" if array else "\n".join(rows))
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace(".parquet", ".json" if array else ".jsonl"))
    data = load_xmc(tmp_path)
    assert [(row["text"], row["label_ids"]) for row in data.train] == dataset_layouts.TRAIN
    assert (data.labels["text"][:], data.filter_pairs["test"].tolist()) == (
        dataset_layouts.LABELS,
        dataset_layouts.FILTER_PAIRS,
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "train, row 0: label_ids must be a list of numbers, got string"),
        (["text", "boat", "car,motor,red"], "labels: not a readable table"),
        (["name", "boat"], "no column text, only name"),
    ],
)
def test_a_repository_in_a_format_without_lists(lines, message, tmp_path):
    dataset_layouts.write_hub(tmp_path)
    for name, table in dataset_layouts.tables().items():
        table.to_csv(tmp_path / "data" / f"{name}.csv")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace(".parquet", ".csv"))
    if lines:
        dataset_layouts.write_lines(tmp_path / "data" / "labels.csv", lines)
    with pytest.raises(ValueError, match=message):
        load_xmc(tmp_path)


@pytest.mark.parametrize("content", ["[{]", '[{"text": "x", "label_ids": [0]}, 7]', '[{"text": 7, "label_ids": [0]}]'])
def test_a_wrong_json_array_is_refused(content, tmp_path):
    dataset_layouts.write_hub(tmp_path)
    (tmp_path / "data" / "train.json").write_text(content)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "data" / "test.json").write_text('[{"text": "x", "label_ids": [0]}]')
    (tmp_path / "README.md").write_text(
        card.replace("train.parquet", "train.json").replace("test.parquet", "test.json")
    )
    with pytest.raises(
        ValueError, match=r"train\.json(, object [01])?: (not valid|expected an object|text must be a string, got 7)"
    ):
        load_xmc(tmp_path)
