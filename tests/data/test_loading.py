"""Every layout gives the same data set; what is wrong is an error with file and line; what is mended is counted."""

import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from datasets import Dataset
from helpers import dataset_layouts

from hf_xmc import Hierarchy, XMCData, load_xmc
from hf_xmc.data.readers.formats import read_json_labels, read_lines

DATA = Path(__file__).parents[2] / "recipes" / "data"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw-layout"
    folder.mkdir()
    dataset_layouts.write_raw(folder)
    return folder


def rows_of(split):
    return [(row["text"], sorted(row["label_ids"])) for row in split]


@pytest.mark.parametrize("layout", dataset_layouts.LAYOUTS)
def test_every_layout_gives_the_same_data(layout, tmp_path):
    folder = tmp_path / layout
    if layout != "prepared":
        folder.mkdir()
    dataset_layouts.LAYOUTS[layout](folder)
    data = load_xmc(folder)
    assert rows_of(data.train) == [(text, sorted(ids)) for text, ids in dataset_layouts.TRAIN]
    assert rows_of(data.test) == [(text, sorted(ids)) for text, ids in dataset_layouts.TEST]
    assert list(data.labels["text"]) == dataset_layouts.LABELS
    expected_ids = list("01234") if layout in ("reference", "pecos", "repository") else [f"L{i}" for i in range(5)]
    assert list(data.labels["uid"]) == expected_ids
    assert data.filter_pairs["test"].tolist() == dataset_layouts.FILTER_PAIRS
    assert data.load_report["train: queries without labels"] == 1
    assert data.load_report["test: empty texts"] == 1
    assert data.label_counts().tolist() == [3, 2, 1, 2, 1]
    assert data.relevance("test").toarray().tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]


def test_raw_files_load_without_gzip(raw):
    for path in raw.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(load_xmc(raw).train) == 7


def test_the_shipped_data_is_what_its_readme_says():
    data = load_xmc(DATA / "wordnet-hypernyms")
    assert (len(data.train), len(data.test), data.num_labels) == (76_342, 18_959, 18_992)
    assert data.label_counts().sum() / len(data.train) == pytest.approx(8.16, abs=0.005)
    assert data.label_counts().min() >= 1
    assert set(data.filter_pairs) == {"train", "test"}


WORDNET = {
    "data.noun": """  1 a licence, indented
00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | that which is
00000002 03 n 02 ice_boat 0 boat 0 002 @ 00000001 n 0000 ~ 00000003 n 0000 | a thing that floats
00000003 03 n 01 dinghy 0 001 @i 00000002 n 0000 | a small one
00000005 03 n 01 canoe 0 001 @ 00000002 n 0000 | paddled
00000006 03 n 01 raft 0 001 @ 00000002 n 0000 | of logs
""",
    "data.verb": """00000004 29 v 01 float 0 000 00 | not sink
""",
}


def test_the_build_script_follows_the_pointers_of_wordnet(tmp_path):
    for name, text in WORDNET.items():
        (tmp_path / name).write_text(text)
    script = DATA / "build_wordnet_hypernyms.py"
    out = tmp_path / "built"
    subprocess.run([sys.executable, script, "--wordnet", tmp_path, "--output_dir", out], check=True, timeout=60)
    data = load_xmc(out)
    assert any("boat" in text and "floats" in text for text in data.labels["text"])
    found = {}
    for split in (data.train, data.test):
        for row in split or []:
            found[row["text"]] = {data.labels[i]["text"].split(":")[0] for i in row["label_ids"]}
    dinghy = next(ids for text, ids in found.items() if text.startswith("dinghy"))
    assert dinghy == {"entity", "ice boat, boat"}
    assert not any("licence" in text for text in found)


def test_the_build_script_writes_direct_hypernyms_without_cycles(tmp_path):
    (tmp_path / "data.noun").write_text(WORDNET["data.noun"])
    verbs = """00000007 29 v 01 restrain 0 001 @ 00000008 v 0000 | keep back
00000008 29 v 01 inhibit 0 002 @ 00000007 v 0000 @ 00000009 v 0000 | hold back
00000009 29 v 01 control 0 000 00 | lessen
"""
    (tmp_path / "data.verb").write_text(verbs)
    script, parents = DATA / "build_wordnet_hypernyms.py", tmp_path / "parents.tsv"
    where = ["--wordnet", tmp_path, "--output_dir", tmp_path / "built", "--parents", parents]
    subprocess.run([sys.executable, script, *where], check=True, timeout=60)
    assert Hierarchy.read(parents).parents == {
        "n00000002": ["n00000001"],
        "n00000003": ["n00000002"],
        "n00000005": ["n00000002"],
        "n00000006": ["n00000002"],
        "v00000008": ["v00000009"],
    }


def rewrite(path, number, change):
    """Change one line of a file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        lines = file.read().split(b"\n")
    lines[number] = change(lines[number])
    with opener(path, "wb") as file:
        file.write(b"\n".join(lines))


def record(**changes):
    return lambda line: json.dumps({**json.loads(line), **changes}).encode()


BAD_LINES = {
    "label id beyond the labels": (
        "trn.json.gz",
        1,
        record(target_ind=[5]),
        r"trn.json.gz:2: label id 5, but there are only 5 labels",
    ),
    "negative label id": ("tst.json.gz", 0, record(target_ind=[-1]), r"tst.json.gz:1: label id -1"),
    "label id that is a fraction": (
        "trn.json.gz",
        1,
        record(target_ind=[0.5]),
        r"gz:2: target_ind must be a list of numbers, got \[0.5\]",
    ),
    "label id beyond 64 bits": (
        "trn.json.gz",
        1,
        record(target_ind=[2**70]),
        r"gz:2: a label id does not fit",
    ),
    "label id that is a truth value": (
        "trn.json.gz",
        1,
        record(target_ind=[True]),
        r"gz:2: target_ind must be a list of numbers, got \[True\]",
    ),
    "no labels given": (
        "trn.json.gz",
        1,
        record(target_ind=None),
        r"trn.json.gz:2: target_ind must be a list of numbers, got None",
    ),
    "lengths that differ": (
        "trn.json.gz",
        0,
        record(target_rel=[1.0]),
        r"trn.json.gz:1: target_ind and target_rel must have the same length, got 2 and 1",
    ),
    "relevance below zero": (
        "trn.json.gz",
        1,
        record(target_rel=[-1.0]),
        r"trn.json.gz:2: label_scores must be finite and at least 0, got -1.0 for label 1",
    ),
    "relevance beyond all numbers": (
        "trn.json.gz",
        1,
        lambda line: line.replace(b"[1.0]", b"[Infinity]"),
        r"trn.json.gz:2: label_scores must be finite and at least 0, got inf",
    ),
    "relevance that is no number": (
        "trn.json.gz",
        1,
        lambda line: line.replace(b"[1.0]", b"[NaN]"),
        r"trn.json.gz:2: label_scores must be finite and at least 0, got nan",
    ),
    "not JSON": ("trn.json.gz", 3, lambda _: b"{'title': 'x'}", r"trn.json.gz:4: not valid JSON"),
    "deeply nested": ("trn.json.gz", 3, lambda _: b"[" * 100_000, r"trn.json.gz:4: not valid JSON"),
    "a blank line in the middle": ("trn.json.gz", 3, lambda _: b"", r"trn.json.gz:4: not valid JSON"),
    "not an object": ("trn.json.gz", 3, lambda _: b"[1, 2]", r"trn.json.gz:4: expected an object in braces"),
    "no text": ("lbl.json.gz", 2, lambda _: b'{"uid": "L2"}', r"lbl.json.gz:3: expected a title or content"),
    "text that is a number": ("lbl.json.gz", 2, record(title=7), r"lbl.json.gz:3: title must be a string, got 7"),
    "not UTF-8": ("tst.json.gz", 1, lambda line: line + b"\xff", r"tst.json.gz:2: byte \d+ is not UTF-8"),
    "NUL": ("tst.json.gz", 1, lambda line: b"\0" + line, r"tst.json.gz:2: the line contains a NUL"),
    "escaped NUL": ("tst.json.gz", 1, record(title="a\0b"), r"tst.json.gz:2: title contains a NUL"),
    "half a surrogate pair": ("tst.json.gz", 1, record(title="\ud800"), r"half of a surrogate pair"),
    "a label id again": ("lbl.json.gz", 2, record(uid="L0"), r"gz:3: uid 'L0' is repeated from .*lbl.json.gz:1, but"),
    "a uid that is null": ("lbl.json.gz", 2, record(uid=None), r"gz:3: uid must be a string, got None"),
    "a uid in some lines": ("lbl.json.gz", 2, lambda _: b'{"title": "x"}', r"gz:3: no uid, unlike the lines before"),
    "a pair of another split": (
        "filter_labels_test.txt",
        1,
        lambda _: b"3 0",
        r"test.txt:2: row 3, label 0, but there are 3 rows",
    ),
    "a pair of a row below zero": ("filter_labels_test.txt", 1, lambda _: b"-1 0", r"test.txt:2: row -1, label 0"),
    "a pair of a label below zero": ("filter_labels_test.txt", 1, lambda _: b"0 -1", r"test.txt:2: row 0, label -1"),
    "a pair beyond the labels": ("filter_labels_test.txt", 1, lambda _: b"0 5", r"0, label 5, .* and 5 labels"),
    "a pair that is no pair": (
        "filter_labels_test.txt",
        0,
        lambda _: b"0",
        r"test.txt:1: expected two numbers",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_an_error_with_file_and_line(case, raw):
    name, number, change, message = BAD_LINES[case]
    rewrite(raw / name, number, change)
    with pytest.raises(ValueError, match=message):
        load_xmc(raw)


def test_blank_lines_may_end_a_raw_file(raw):
    for name in ("lbl", "trn", "tst"):
        with gzip.open(raw / f"{name}.json.gz", "ab") as file:
            file.write(b"\n\n")
    data = load_xmc(raw)
    assert (len(data.labels), len(data.train), len(data.test)) == (5, 7, 3)


def test_a_truncated_gzip_does_not_load(raw):
    path = raw / "trn.json.gz"
    whole = path.read_bytes()
    for keep in (len(whole) - 1, len(whole) - 9, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"trn.json.gz: damaged or truncated after line \d"):
            load_xmc(raw)


def test_a_gzip_that_swells_does_not_load(raw):
    with gzip.open(raw / "trn.json.gz", "wb") as file:
        file.write(b" " * 2**26 + b"\n" + b"\n" * 2**26)
    with pytest.raises(ValueError, match="damaged or hostile"):
        load_xmc(raw)


def test_a_byte_order_mark_is_removed_only_at_the_start(tmp_path):
    (tmp_path / "x.txt").write_text("\ufeffone\n\ufefftwo\n", encoding="utf-8")
    load_report = Counter()
    assert [line for line, _ in read_lines(tmp_path / "x.txt", load_report)] == ["one", "\ufefftwo"]
    assert load_report == {"x.txt: byte order mark removed": 1}


def test_a_line_or_a_file_beyond_the_limit_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.data.readers.formats.MAX_LINE", 100)
    (tmp_path / "x.txt").write_bytes(b"short\n" + b"a" * 99 + b"\n" + b"b" * 100)
    assert [len(line) for line, _ in read_lines(tmp_path / "x.txt", Counter())] == [5, 99, 100]
    (tmp_path / "x.txt").write_bytes(b"short\n" + b"a" * 101)
    with pytest.raises(ValueError, match=r"x.txt:2: a line exceeds"):
        list(read_lines(tmp_path / "x.txt", Counter()))
    with gzip.open(tmp_path / "x.gz", "wb") as file:
        file.write(b"word\n" * 2**20)
    with pytest.raises(ValueError, match=r"x.gz:\d+: the file exceeds"):
        list(read_lines(tmp_path / "x.gz", Counter()))


def test_texts_are_gathered_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.data.readers.formats.ROWS_A_BATCH", 2)
    lines = [json.dumps({"title": title}) + "\n" for title in "abcde"]
    (tmp_path / "x.json").write_text("".join(lines))
    assert read_json_labels(tmp_path / "x.json", Counter())[0].to_pylist() == [*"abcde"]
    (tmp_path / "x.json").write_text("".join([*lines[:3], '{"title": "\\ud800"}\n']))
    with pytest.raises(ValueError, match="rows 2 and following: a text contains half of a surrogate pair"):
        read_json_labels(tmp_path / "x.json", Counter())


def test_blank_lines_between_filter_pairs_are_skipped(raw):
    rewrite(raw / "filter_labels_test.txt", 1, lambda line: b"\n" + line + b"\n \n")
    assert load_xmc(raw).filter_pairs["test"].tolist() == dataset_layouts.FILTER_PAIRS


def test_corrections_are_counted(raw):
    rewrite(raw / "trn.json.gz", 0, record(target_ind=[0, 3, 0], target_rel=[0.5, 1.0, 2.0]))
    rewrite(raw / "trn.json.gz", 1, record(target_ind=[1, 2], target_rel=[1.0, 0.0]))
    rewrite(raw / "lbl.json.gz", 4, record(title="boat"))
    rewrite(raw / "lbl.json.gz", 0, lambda line: b"\xef\xbb\xbf" + line)
    rewrite(raw / "filter_labels_test.txt", 1, lambda _: b"0 0")
    data = load_xmc(raw)
    assert data.load_report == {
        "lbl.json.gz: byte order mark removed": 1,
        "labels: repeated texts": 1,
        "filter_labels_test.txt: repeated pairs": 1,
        "train: relevance 0, not a positive": 1,
        "train: repeated label of a query": 1,
        "train: queries without labels": 1,
        "test: empty texts": 1,
    }
    row = data.train[0]
    assert dict(zip(row["label_ids"], row["label_scores"], strict=True)) == {0: 2.0, 3: 1.0}
    assert data.train[1]["label_ids"] == [1]
    assert data.relevance("train").toarray()[0].tolist() == [2, 0, 0, 1, 0]


def test_bytes_that_are_not_utf8_are_replaced_when_asked(raw):
    rewrite(raw / "tst.json.gz", 0, lambda line: line.replace(b"the boat", b"the bo\xffat"))
    with pytest.raises(ValueError, match="errors='replace'"):
        load_xmc(raw)
    data = load_xmc(raw, errors="replace")
    assert data.test[0]["text"] == "the bo\ufffdat"
    assert data.load_report["tst.json.gz: lines with bytes replaced"] == 1
    with pytest.raises(ValueError, match="`errors` must be 'strict' or 'replace', got 'ignore'"):
        load_xmc(raw, errors="ignore")


@pytest.fixture
def reference(tmp_path):
    folder = tmp_path / "reference-layout"
    folder.mkdir()
    dataset_layouts.write_reference(folder)
    return folder


def test_carriage_returns_at_ends_of_lines_are_removed_and_counted(reference):
    for name, text in (("Y", "\r\n".join(dataset_layouts.LABELS)), ("tst_X", "the\rboat\r\nred and blue\n\r\n")):
        (reference / "raw" / f"{name}.txt").write_bytes(text.encode())
    data = load_xmc(reference)
    assert (data.labels["text"], data.test["text"]) == (dataset_layouts.LABELS, ["the\rboat", "red and blue", ""])
    assert {name: count for name, count in data.load_report.items() if "carriage returns" in name} == {
        "Y.txt: carriage returns removed from ends of lines": 4,
        "tst_X.txt: carriage returns removed from ends of lines": 2,
    }


def test_texts_and_labels_of_different_lengths_are_refused(reference):
    with (reference / "raw" / "trn_X.txt").open("a") as file:
        file.write("one more\n")
    with pytest.raises(
        ValueError, match=r"trn_X.txt must have one line for each of the 7 rows of .*Y.trn.npz, got 8 lines"
    ):
        load_xmc(reference)


def test_half_a_split_is_refused(reference):
    (reference / "Y.tst.npz").rename(reference / "away")
    with pytest.raises(ValueError, match=r"tst_X.txt exists, but .*Y.tst.npz is missing"):
        load_xmc(reference)
    (reference / "away").rename(reference / "Y.tst.npz")
    (reference / "raw" / "tst_X.txt").unlink()
    with pytest.raises(ValueError, match=r"Y.tst.npz exists, but .*tst_X.txt is missing"):
        load_xmc(reference)


def test_a_missing_training_split_is_refused(raw, reference):
    (raw / "trn.json.gz").unlink()
    with pytest.raises(ValueError, match=r"has lbl.json\(.gz\), but trn.json\(.gz\) is missing"):
        load_xmc(raw)
    for path in (reference / "raw" / "trn_X.txt", reference / "Y.trn.npz"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has raw/Y.txt, but raw/trn_X.txt is missing"):
        load_xmc(reference)


def test_an_empty_file_of_labels_is_refused(raw):
    with gzip.open(raw / "lbl.json.gz", "wb"):
        pass
    with pytest.raises(ValueError, match="there are no labels"):
        load_xmc(raw)


def damage_pickle(path):
    np.savez(path, indices=np.array([{}], dtype=object), indptr=[0], data=[1], shape=[1, 1], format="csr")


def damage_huge_shape(path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,), }"
    header += b" " * (117 - len(header)) + b"\n"
    huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", huge)


def damage_columns(path):
    rows = sp.load_npz(path)
    rows.indices[0] = 77
    sp.save_npz(path, rows)


def damage_values(path):
    np.savez(path, indices=[0], indptr=[0, 1], data=np.ones(10), shape=[1, 5], format="csr")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_values, "10 values and 1 indices"),
        (damage_pickle, "Python objects"),
        (damage_huge_shape, "claims 40000000000 bytes"),
        (damage_columns, "not a readable sparse matrix"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a readable sparse matrix"),
        (lambda path: path.write_text("hello"), "not a readable sparse matrix"),
        (lambda path: sp.save_npz(path, sp.coo_matrix((7, 5))), "a csr matrix has"),
        (
            lambda path: sp.save_npz(path, dataset_layouts.matrix(dataset_layouts.TRAIN, num_labels=9)),
            "Y.txt must have one line for each of the 9 columns .*, got 5 lines",
        ),
        (lambda path: sp.save_npz(path, sp.csr_array(dataset_layouts.matrix(dataset_layouts.TRAIN))), None),
        (
            lambda path: sp.save_npz(path, -dataset_layouts.matrix(dataset_layouts.TRAIN)),
            "row 0: label_scores must be finite and at least 0, got -1.0",
        ),
    ],
)
def test_damaged_and_hostile_matrices_are_refused(reference, damage, message):
    path = reference / "Y.trn.npz"
    damage(path)
    if message is None:
        assert len(load_xmc(reference).train) == 7
    else:
        with pytest.raises(ValueError, match=message):
            load_xmc(reference)


def test_folders_without_a_data_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="which is not a known layout"):
        load_xmc(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"x.txt must be a table .* for a data set in several files, pass the folder"):
        load_xmc(tmp_path / "x.txt")


def test_a_prepared_data_set_is_replaced_and_anything_else_left_alone(raw, tmp_path):
    data = load_xmc(raw)
    prepared = tmp_path / "prepared"
    data.save(prepared)
    data.save(prepared)
    assert [path.name for path in tmp_path.iterdir() if "tmp-" in path.name] == []
    again = load_xmc(prepared)
    assert rows_of(again.train) == rows_of(data.train)
    assert again.load_report == data.load_report
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a prepared data set"):
        data.save(mine)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_damaged_prepared_data_set_is_refused(raw, tmp_path):
    data = load_xmc(raw)
    prepared = tmp_path / "prepared"
    data.save(prepared)
    shutil.rmtree(prepared / "test")
    data.test.select([0]).save_to_disk(prepared / "test")
    with pytest.raises(ValueError, match=r"has 1 rows, expected 3\. Prepare the data set again"):
        load_xmc(prepared)
    data.save(prepared)
    np.save(prepared / "filter_pairs_test.npy", np.array([[{}, {}]], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_xmc(prepared)
    (prepared / "xmc_data.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="prepared in format 99"):
        load_xmc(prepared)
    for damaged in ("{", "[]", "\ufeff"):
        (prepared / "xmc_data.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"prepared/xmc_data.json is damaged .*\. Prepare the data set again"):
            load_xmc(prepared)


@pytest.mark.parametrize("rows", [{"text": [], "label_ids": []}, {"text": ["x"], "label_ids": [[]]}])
def test_queries_without_labels_load_and_are_counted(rows):
    data = XMCData(Dataset.from_dict(rows), labels=Dataset.from_dict({"text": ["a", "b"]}))
    assert data.relevance("train").shape == (len(rows["text"]), 2)
    assert data.label_counts().tolist() == [0, 0]


def many(texts):
    return XMCData(
        train=Dataset.from_dict({"text": texts, "label_ids": [[i % 3] for i in range(len(texts))]}),
        labels=Dataset.from_dict({"uid": list("abc"), "text": list("abc")}),
        filter_pairs={"train": np.array([[i, i % 3] for i in range(len(texts))])},
    )


def test_validation_queries_are_selected_by_their_text():
    texts = [f"text {i % 83}" for i in range(97)]
    carved = many(texts).carve_validation(0.2)
    shuffled = many(texts[::-1]).carve_validation(0.2)
    mine, theirs = set(carved.validation["text"]), set(carved.train["text"])
    assert not mine & theirs
    assert set(shuffled.validation["text"]) == mine
    assert 19 <= len(carved.validation) <= 21
    assert len(carved.train) + len(carved.validation) == 97


def test_filter_pairs_move_with_their_rows():
    data = many([f"text {i}" for i in range(41)])
    carved = data.carve_validation(7)
    assert len(carved.validation) == 7
    for split in ("train", "validation"):
        pairs = carved.filter_pairs[split]
        assert pairs[:, 0].tolist() == list(range(len(carved.split(split))))
        assert pairs[:, 1].tolist() == [row["label_ids"][0] for row in carved.split(split)]


def test_an_impossible_validation_split_is_refused():
    data = many([f"text {i}" for i in range(10)])
    for size in (0, 10, 1.0, 0.01):
        with pytest.raises(ValueError, match="must leave some of the 10 training queries"):
            data.carve_validation(size)
    with pytest.raises(ValueError, match="the data set already has a validation split"):
        data.carve_validation(2).carve_validation(2)
    with pytest.raises(ValueError, match="all texts are equal"):
        many(["same"] * 5).carve_validation(2)


@pytest.mark.parametrize("graded", [False, True])
def test_positives_of_rare_labels_are_weighed(graded):
    train = Dataset.from_dict({"text": [*"abcd"], "label_ids": [[0, 1], [0], [], [0]]})
    if graded:
        train = train.add_column("label_scores", [[1.0, 3.0], [1.0], [], [2.0]])
    data = XMCData(train, labels=Dataset.from_dict({"text": ["often", "once"]}))
    c = np.log(4) - 1
    often, once = 1 + c * (2.5 / 4.5) ** 0.55, 1 + c  # counts 3 and 1
    given = [[1, 3], [1], [], [2]] if graded else [[1, 1], [1], [], [1]]
    for exponent in (0, 0.5, 1):
        weighed = data.weight_positives(exponent).train
        expected = [[score * w**exponent for score, w in zip(row, (often, once), strict=False)] for row in given]
        assert weighed["text"] == [*"abcd"]
        assert weighed["label_ids"] == train["label_ids"]
        for found, right in zip(weighed["label_scores"], expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`exponent` must be a finite number, .* got nan"):
        data.weight_positives(float("nan"))
