"""Files that do not belong together are refused by name, and so are numbers whose meaning would be a guess."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from datasets import Dataset, load_from_disk
from helpers import dataset_layouts

from hf_xmc import XMCData, load_xmc

PORTS = ["boats", "harbours", "cranes"]


def write(folder, labels, **splits):
    for name, rows in {"labels": labels, **splits}.items():
        dataset_layouts.write_lines(folder / f"{name}.jsonl", [json.dumps(row) for row in rows])


def as_hub(folder):
    """Make a folder of tables one like a repository of the Hub."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    (folder / "queries").mkdir()
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem in ("train", "validation", "test"):
            path.rename(folder / "queries" / path.name)
            lines.append(f"  - {{split: {path.stem}, path: queries/{path.name}}}")
    (folder / "labels.jsonl").rename(folder / "queries" / "names.jsonl")
    lines += ["- config_name: labels", "  data_files: queries/names.jsonl", "---", ""]
    (folder / "README.md").write_text("\n".join(lines))


@pytest.mark.parametrize("split", ["trn", "tst"])
@pytest.mark.parametrize("num_columns", [4, 6])
def test_a_matrix_has_one_column_per_label(split, num_columns, tmp_path):
    dataset_layouts.write_reference(tmp_path)
    path = tmp_path / f"Y.{split}.npz"
    num_rows = sp.load_npz(path).shape[0]
    sp.save_npz(path, sp.csr_matrix((num_rows, num_columns), dtype=np.float32))
    with pytest.raises(
        ValueError,
        match=rf"raw/Y\.txt must have one line for each of the {num_columns} columns of .*Y\.{split}\.npz, got 5",
    ):
        load_xmc(tmp_path)


def test_a_line_break_inside_a_label_text_is_named_as_the_probable_cause(tmp_path):
    dataset_layouts.write_reference(tmp_path)
    dataset_layouts.write_lines(tmp_path / "raw" / "Y.txt", ["boat", "car\n(motor)", "animal", "red", "blue"])
    with pytest.raises(
        ValueError,
        match=r"must have one line for each of the 5 columns of .*, got 6 lines.* Does a text of .*Y\.txt contain",
    ):
        load_xmc(tmp_path)


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("split", ["trn", "tst"])
def test_a_matrix_has_one_row_per_text(change, split, tmp_path):
    dataset_layouts.write_reference(tmp_path)
    path = tmp_path / "raw" / f"{split}_X.txt"
    lines = path.read_text().splitlines() if split == "tst" else path.read_text().split("\n")[:-1]
    dataset_layouts.write_lines(path, [*lines, "more"] if change > 0 else lines[:-1])
    with pytest.raises(
        ValueError,
        match=rf"{split}_X\.txt must have one line for each of the {len(lines)} rows of .*, got {len(lines) + change}",
    ):
        load_xmc(tmp_path)


@pytest.mark.parametrize("layout", ["raw", "reference"])
def test_filter_pairs_of_a_missing_split_are_refused(layout, tmp_path):
    dataset_layouts.LAYOUTS[layout](tmp_path)
    for name in ("tst.json.gz", "Y.tst.npz", "raw/tst_X.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"filter_labels_test\.txt:1: row 0, label 0, but there are 0 rows"):
        load_xmc(tmp_path)


TWICE = [
    ("raw", "lbl.json.gz", "lbl.json"),
    ("raw", "trn.json.gz", "trn.json"),
    ("raw", "tst.json.gz", "tst.json"),
    ("jsonl", "labels.jsonl", "labels.parquet"),
    ("jsonl", "train.jsonl", "train.parquet"),
    ("parquet", "test.parquet", "test.jsonl"),
    ("parquet", "filter_pairs.parquet", "filter_pairs.jsonl"),
]


@pytest.mark.parametrize(("layout", "name", "other"), TWICE)
def test_two_files_of_one_table_are_refused(layout, name, other, tmp_path):
    dataset_layouts.LAYOUTS[layout](tmp_path)
    (tmp_path / other).write_text("")
    with pytest.raises(ValueError, match=r"are the same table.* Remove ") as caught:
        load_xmc(tmp_path)
    assert all(f"{tmp_path / file} " in str(caught.value) for file in (name, other))


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ("raw", "reference", "lbl.json.gz and raw/Y.txt"),
        ("raw", "jsonl", "lbl.json.gz and labels.jsonl"),
        ("reference", "parquet", "raw/Y.txt and labels.parquet"),
        ("prepared", "jsonl", "xmc_data.json and labels.jsonl"),
    ],
)
def test_two_layouts_in_one_folder_are_refused(one, other, names, tmp_path):
    folder = tmp_path / "data"
    if one != "prepared":
        folder.mkdir()
    dataset_layouts.LAYOUTS[one](folder)
    dataset_layouts.LAYOUTS[other](folder)
    with pytest.raises(ValueError, match=f"contains {names}, which belong to two layouts"):
        load_xmc(folder)


def test_tables_of_other_names_are_named_as_not_read(tmp_path, caplog):
    dataset_layouts.write_jsonl(tmp_path)
    for name in ("test.json", "dev.jsonl", "train.csv", "filter_labels_test.txt", "labels.txt", "README.md"):
        (tmp_path / name).write_text("")
    load_xmc(tmp_path)
    assert "ignored dev.jsonl, filter_labels_test.txt, test.json, train.csv. The tables are labels, tr" in caplog.text


def test_labels_at_the_root_of_a_repository_are_read(tmp_path):
    write(tmp_path, [{"text": text} for text in PORTS], train=[{"text": "a ferry", "label_ids": [2]}])
    as_hub(tmp_path)
    (tmp_path / "queries" / "names.jsonl").rename(tmp_path / "labels.jsonl")
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("queries/names.jsonl", "labels.jsonl"))
    assert load_xmc(tmp_path).relevance("train").toarray().tolist() == [[0, 0, 1]]


PAIRS = {
    "row": (np.array([[3, 0]]), "has row 3, label 0, but there are 3 rows and 5 labels"),
    "label": (np.array([[0, 5]]), "has row 0, label 5, but there are 3 rows and 5 labels"),
    "negative": (np.array([[0, -1]]), "has row 0, label -1"),
    "fractions": (np.array([[0.0, 1.0]]), r"must be whole numbers of shape \(M, 2\), .* got float64"),
    "columns": (np.array([[0, 1, 2]]), r"must be whole numbers of shape \(M, 2\), .* of shape \(1, 3\)"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_filter_pairs_that_do_not_fit_their_split_are_refused(case, tmp_path):
    pairs, message = PAIRS[case]
    dataset_layouts.write_raw(tmp_path)
    data = load_xmc(tmp_path)
    with pytest.raises(ValueError, match=f"filter_pairs of test {message}"):
        replace(data, filter_pairs={"test": pairs})
    with pytest.raises(ValueError, match="filter_pairs of validation has row 0, label 0, but there are 0 rows"):
        replace(data, filter_pairs={"validation": np.array([[0, 0]])})
    assert replace(data, filter_pairs={"validation": np.empty((0, 2))}).validation is None


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set in which all splits have the same number of rows."""
    rows = {name: {"text": [f"{name} {n}" for n in range(3)], "label_ids": [[n] for n in range(3)]} for name in SPLITS}
    pairs = {name: np.array([[0, n]]) for n, name in enumerate(SPLITS)}
    labels = Dataset.from_dict({"uid": ["a", "b", "c"], "text": PORTS})
    data = XMCData(**{n: Dataset.from_dict(r) for n, r in rows.items()}, labels=labels, filter_pairs=pairs)
    data.save(tmp_path / "prepared")
    return tmp_path / "prepared"


SPLITS = ("train", "validation", "test")


def swap(one, other):
    one.rename(one.with_name("third"))
    other.rename(one)
    one.with_name("third").rename(other)


@pytest.mark.parametrize("other", ["validation", "test"])
def test_swapped_prepared_splits_are_refused(other, prepared):
    assert load_xmc(prepared).split(other)["text"][0] == f"{other} 0"
    swap(prepared / "train", prepared / other)
    with pytest.raises(ValueError, match="prepared/train differs from the part that was saved"):
        load_xmc(prepared)


def test_swapped_prepared_filter_pairs_are_refused(prepared):
    swap(prepared / "filter_pairs_train.npy", prepared / "filter_pairs_test.npy")
    with pytest.raises(ValueError, match="prepared/filter_pairs_train differs from the part that was saved"):
        load_xmc(prepared)


def test_prepared_labels_of_another_data_set_are_refused(prepared):
    shutil.rmtree(prepared / "labels")
    Dataset.from_dict({"uid": ["a", "b", "c"], "text": ["boats", "cranes", "harbours"]}).save_to_disk(
        prepared / "labels"
    )
    with pytest.raises(ValueError, match="prepared/labels differs from the part that was saved"):
        load_xmc(prepared)


def test_a_prepared_data_set_of_an_older_version_has_its_sizes_checked(prepared):
    about = json.loads((prepared / "xmc_data.json").read_text())
    del about["digests"]
    (prepared / "xmc_data.json").write_text(json.dumps(about))
    assert load_xmc(prepared).filter_pairs["test"].tolist() == [[0, 2]]
    shutil.rmtree(prepared / "validation")
    Dataset.from_dict({"text": ["x"] * 3, "label_ids": [[0], [0], [3]]}).save_to_disk(prepared / "validation")
    with pytest.raises(ValueError, match=r"prepared: validation, row 2: label id 3, but there are only 3 labels"):
        load_xmc(prepared)
    np.save(prepared / "filter_pairs_test.npy", np.array([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match=r"filter_pairs_test.npy has shape \(2, 2\), expected \(1, 2\)"):
        load_xmc(prepared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "labels"), "prepared/labels is missing or damaged"),
        (lambda folder: (folder / "filter_pairs_test.npy").unlink(), r"filter_pairs_test\.npy is missing or damaged"),
        (lambda folder: (folder / "train" / "state.json").write_text("{"), "prepared/train is missing or damaged"),
        (lambda folder: drop(folder, "rows", "validation"), "prepared/validation exists, but xmc_data.json does not"),
        (lambda folder: drop(folder, "rows", "train"), "xmc_data.json is damaged: expected rows of labels, train"),
        (lambda folder: drop(folder, "load_report"), "xmc_data.json is damaged: expected rows of labels, train"),
    ],
)
def test_missing_prepared_parts_are_refused(change, message, prepared):
    change(prepared)
    with pytest.raises(ValueError, match=message):
        load_xmc(prepared)


def drop(folder, *keys):
    about = json.loads((folder / "xmc_data.json").read_text())
    inner = about
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    (folder / "xmc_data.json").write_text(json.dumps(about))


def test_a_prepared_data_set_may_hold_unused_columns(prepared):
    train = load_from_disk(prepared / "train").add_column("source", [{"page": 1}, None, {"page": 3}])
    train.save_to_disk(prepared.with_name("more"))
    shutil.rmtree(prepared / "train")
    prepared.with_name("more").rename(prepared / "train")
    assert load_xmc(prepared).train.column_names == ["text", "label_ids"]


def test_the_card_of_a_repository_counts_its_rows(tmp_path):
    dataset_layouts.write_hub(tmp_path)
    card = (tmp_path / "README.md").read_text()
    said = "---\ndataset_info:\n- config_name: default\n  splits:\n  - {name: train, num_bytes: 1, num_examples: %d}\n"
    (tmp_path / "README.md").write_text(card.replace("---\n", said % 7, 1))
    assert len(load_xmc(tmp_path).train) == 7
    (tmp_path / "README.md").write_text(card.replace("---\n", said % 8, 1))
    with pytest.raises(ValueError, match="train: the files have 7 rows, but the card says 8"):
        load_xmc(tmp_path)


def test_a_repository_with_two_tables_of_labels_is_refused(tmp_path):
    dataset_layouts.write_hub(tmp_path)
    card = (tmp_path / "README.md").read_text()
    two = "\n  - {split: a, path: data/labels.parquet}\n  - {split: b, path: data/labels.parquet}\n"
    (tmp_path / "README.md").write_text(card.replace(" data/labels.parquet\n", two))
    with pytest.raises(ValueError, match="labels: expected one split, got a, b"):
        load_xmc(tmp_path)


# The uid of each label, the label_ids of a query, and the expected message: None if there is no doubt.
NUMBERS = {
    "counted from 1": ([1, 2, 3], [1], "row 0: uid is 1, .* counted from 1"),
    "counted from 1, beyond the rows": ([1, 2, 3], [3], "row 0: uid is 1, .* counted from 1"),
    "in another order": ([2, 0, 1], [2], "row 0: uid is 2, .* are not the row numbers 0 to 2"),
    "the last two swapped": ([0, 2, 1], [0], "row 1: uid is 2"),
    "codes": ([10, 20, 30], [1], "row 0: uid is 10"),
    "fractions": ([1.0, 2.0, 3.0], [1], "row 0: uid is 1.0"),
    "digits counted from 1": (["1", "2", "3"], [1], "row 0: uid is 1, .* counted from 1"),
    "digits in another order": (["2", "0", "1"], [2], "row 0: uid is 2"),
    "row numbers": ([0, 1, 2], [1], None),
    "digits that are row numbers": (["0", "1", "2"], [1], None),
    "digits that are used by none": (["1", "2", "3"], [0], None),
    "codes of digits": (["2356", "17", "4"], [1], None),
    "names": (["L2", "L0", "L1"], [2], None),
    "no label at all": ([2, 0, 1], [], None),
}


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("case", NUMBERS)
def test_numeric_uids_that_are_not_row_numbers_are_refused(case, hub, tmp_path):
    ids, used, message = NUMBERS[case]
    labels = [{"uid": uid, "text": text} for uid, text in zip(ids, PORTS, strict=True)]
    write(tmp_path, labels, train=[{"text": "x", "label_ids": []}], validation=[{"text": "y", "label_ids": used}])
    if hub:
        as_hub(tmp_path)
    if message is None:
        assert load_xmc(tmp_path).validation["label_ids"][:] == [used]
        return
    with pytest.raises(ValueError, match=f"labels, {message}"):
        load_xmc(tmp_path)


def test_numeric_uids_in_memory_are_checked_too():
    train = Dataset.from_dict({"text": ["x"], "label_ids": [[2]]})
    with pytest.raises(ValueError, match=r"^labels, row 0: uid is 1, .* counted from 1"):
        XMCData(train, Dataset.from_dict({"uid": [1, 2, 3], "text": PORTS}))
    for names in ([0, 1, 2], ["2", "0", "1"]):  # text is a name: a part of the labels keeps the names of the whole
        assert XMCData(train, Dataset.from_dict({"uid": names, "text": PORTS})).label_counts().tolist() == [
            0,
            0,
            1,
        ]


# 0/1 rows with three labels, and whether they are read as label ids.
ROWS = {
    "multi-hot": ([[0, 0, 1], [1, 0, 1]], False),
    "one-hot": ([[0, 1, 0]], False),
    "all zero": ([[0, 0, 0]], False),
    "one row has a number of its own": ([[0, 1, 1], [2, 1, 0]], True),
    "one row is shorter": ([[0, 1, 1], [0, 1]], True),
}


@pytest.mark.parametrize("layout", ["tables", "hub", "raw", "memory"])
@pytest.mark.parametrize("case", ROWS)
def test_rows_as_long_as_the_list_of_labels_are_refused_if_they_may_be_flags(case, layout, tmp_path):
    label_ids, are_ids = ROWS[case]
    rows = [{"text": f"text {number}", "label_ids": ids} for number, ids in enumerate(label_ids)]

    def load():
        labels = [{"text": text} for text in PORTS]
        if layout == "memory":
            return XMCData(Dataset.from_list(rows), Dataset.from_list(labels))
        if layout == "raw":
            dataset_layouts.write_gzip(tmp_path / "lbl.json.gz", [{"title": text} for text in PORTS])
            records = [{"title": row["text"], "target_ind": row["label_ids"]} for row in rows]
            dataset_layouts.write_gzip(tmp_path / "trn.json.gz", records)
        else:
            write(tmp_path, labels, train=rows)
        if layout == "hub":
            as_hub(tmp_path)
        return load_xmc(tmp_path)

    if are_ids:
        assert load().label_counts().tolist() == [len(label_ids)] * 2 + [sum(2 in ids for ids in label_ids)]
        return
    with pytest.raises(ValueError, match="flags, one per label"):
        load()


def test_rows_that_name_both_of_two_labels_are_ids(tmp_path):
    write(tmp_path, [{"text": "boats"}, {"text": "cranes"}], train=[{"text": "x", "label_ids": [0, 1]}] * 3)
    assert load_xmc(tmp_path).label_counts().tolist() == [3, 3]


def test_flags_per_label_text_are_refused():
    labels = Dataset.from_dict({"uid": ["b", "c", "b", "c"], "text": ["boat", "crane", "ship", "hoist"]})
    rows = Dataset.from_dict({"text": ["x", "y"], "label_ids": [[1, 0, 0, 0], [0, 1, 0, 1]]})
    with pytest.raises(
        ValueError, match=r"row 0: label_ids is \[1, 0, 0, 0\], every row has 4 numbers.* flags, one per"
    ):
        XMCData(rows, labels)


def test_numeric_uids_of_labels_with_several_texts_are_refused():
    labels = Dataset.from_dict({"uid": [1, 0, 1], "text": ["boat", "crane", "ship"]})
    rows = Dataset.from_dict({"text": ["x"], "label_ids": [[1]]})
    with pytest.raises(ValueError, match=r"not the label numbers 0 to 1.* in the order in which they first") as caught:
        XMCData(rows, labels)
    assert "leave uid out" not in str(caught.value), "each text would be a label of its own"


def test_rows_of_two_labels_that_may_be_flags_are_refused(tmp_path):
    labels, texts = (
        [{"text": "boats"}, {"text": "cranes"}],
        [{"text": "x", "label_ids": ids} for ids in ([0, 1], [1, 0])],
    )
    write(tmp_path, labels, train=texts)
    with pytest.raises(ValueError, match=r"ids, write each row in ascending order: \[0, 1\]"):
        load_xmc(tmp_path)
    write(tmp_path, labels, train=[{"text": "x", "label_ids": [0, 0]}, *texts])
    with pytest.raises(ValueError, match="flags, one per label") as caught:
        load_xmc(tmp_path)
    assert "ascending" not in str(caught.value)
