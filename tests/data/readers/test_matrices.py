"""Matrix layouts: one text per line and a matrix of labels; halves of a layout are refused by name."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import dataset_layouts
from helpers.dataset_layouts import write_lines

from hf_xmc import load_xmc


@pytest.fixture
def pecos(tmp_path):
    dataset_layouts.write_pecos(tmp_path)
    return tmp_path


@pytest.fixture
def repository(tmp_path):
    dataset_layouts.write_repository(tmp_path)
    return tmp_path


def test_pecos_names_its_labels_in_one_of_two_files(pecos):
    (pecos / "output-items.txt").rename(pecos / "Z.all.txt")
    assert load_xmc(pecos).labels["text"] == dataset_layouts.LABELS
    write_lines(pecos / "output-items.txt", dataset_layouts.LABELS)
    with pytest.raises(ValueError, match=r"output-items.txt and .*Z.all.txt are the same table"):
        load_xmc(pecos)


def test_scores_of_a_text_matrix_are_kept(repository):
    write_lines(repository / "tst_X_Y.txt", ["3 5", "0:0.5 4:2", "", "2:1.00000"])
    data = load_xmc(repository)
    assert data.relevance("test").toarray().tolist() == [[0.5, 0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


BAD_MATRICES = {
    "no header": (["0:1.0", "", "2:1"], r"tst_X_Y.txt:1: expected the numbers of rows and of labels, got '0:1.0'"),
    "empty": ([], r"tst_X_Y.txt:1: expected the numbers"),
    "a label alone": (["3 5", "0:1", "3", "2:1"], r"tst_X_Y.txt:3: expected `label:score`, got '3'"),
    "a name": (["3 5", "0:1", "red:1", "2:1"], r"tst_X_Y.txt:3: expected `label:score`, got 'red:1'"),
    "cut short": (["3 5", "0:1", "3:1"], r"tst_X_Y.txt:1: the first line says 3 rows, but 2 lines follow"),
    "too many lines": (["3 5", "0:1", "", "2:1", ""], r"the first line says 3 rows, but 4 lines follow"),
    "another number of rows": (
        ["2 5", "0:1", "3:1"],
        r"tst_X.txt must have one line for each of the 2 rows of .*tst_X_Y.txt, got 3 lines",
    ),
    "another number of labels": (
        ["3 9", "0:1", "3:1", "2:1"],
        r"Y.txt must have one line for each of the 9 columns of .*tst_X_Y.txt, got 5 lines",
    ),
    "a label beyond the labels": (["3 5", "0:1", "5:1", "2:1"], r"tst_X_Y.txt:3: label id 5, but there are only 5"),
    "a score below zero": (
        ["3 5", "0:1", "3:-1", "2:1"],
        r"tst_X_Y.txt:3: label_scores must be finite and at least 0, got -1.0 for label 3",
    ),
    "a label beyond 64 bits": (["3 5", "0:1", f"{2**70}:1", "2:1"], r"tst_X_Y.txt:3: expected `label:score`"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_a_bad_line_of_a_matrix_is_an_error_with_file_and_line(case, repository):
    lines, message = BAD_MATRICES[case]
    write_lines(repository / "tst_X_Y.txt", lines)
    with pytest.raises(ValueError, match=message):
        load_xmc(repository)


def test_a_matrix_of_another_shape_is_refused(pecos):
    sp.save_npz(pecos / "Y.tst.npz", sp.csr_matrix(np.ones((4, 5), dtype=np.float32)))
    with pytest.raises(
        ValueError, match=r"X.tst.txt must have one line for each of the 4 rows of .*Y.tst.npz, got 3 lines"
    ):
        load_xmc(pecos)


HALVES = [
    ("pecos", ["output-items.txt"], r"has X.trn.txt, but output-items.txt or Z.all.txt is missing"),
    ("pecos", ["output-items.txt", "X.trn.txt"], r"has Y.trn.npz, but output-items.txt or Z.all.txt is missing"),
    ("pecos", ["X.trn.txt"], r"Y.trn.npz exists, but .*X.trn.txt is missing"),
    ("pecos", ["Y.tst.npz"], r"X.tst.txt exists, but .*Y.tst.npz is missing"),
    ("repository", ["Y.txt"], r"has trn_X.txt, but Y.txt is missing"),
    ("repository", ["Y.txt", "trn_X.txt"], r"has trn_X_Y.txt, but Y.txt is missing"),
    ("repository", ["trn_X_Y.txt"], r"trn_X.txt exists, but .*trn_X_Y.txt is missing"),
    ("repository", ["trn_X.txt", "trn_X_Y.txt"], r"has Y.txt, but trn_X.txt is missing"),
    ("reference", ["raw/Y.txt"], r"has raw/trn_X.txt, but raw/Y.txt is missing"),
    ("raw", ["lbl.json.gz"], r"has trn.json\(.gz\), but lbl.json\(.gz\) is missing"),
]


@pytest.mark.parametrize(("layout", "missing", "message"), HALVES)
def test_half_of_a_layout_is_refused_with_the_name_of_the_missing_file(layout, missing, message, tmp_path):
    dataset_layouts.LAYOUTS[layout](tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=message):
        load_xmc(tmp_path)


def test_the_matrices_of_raw_files_are_not_a_second_layout(tmp_path):
    dataset_layouts.write_raw(tmp_path)
    write_lines(tmp_path / "trn_X_Y.txt", ["7 5"])
    assert len(load_xmc(tmp_path).train) == 7


def test_two_files_of_filter_pairs_are_refused(repository):
    write_lines(repository / "filter_labels_test.txt", ["0 0"])
    with pytest.raises(ValueError, match=r"filter_labels_test.txt and .*tst_filter_labels.txt are the same table"):
        load_xmc(repository)
