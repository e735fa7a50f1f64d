"""The files in the example of PECOS' text2text application."""

import pytest

from hf_xmc import load_xmc

LABELS = ["Artificial intelligence researchers", "Computability theorists", "Deep Learning"]
LINES = [
    "0,1\tAlan Turing is the father of computer science.",
    "2\tLeCun applied backpropagation\tto digits.",
    "\tNobody",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "output-labels.txt").write_text("\n".join(LABELS) + "\n")
    (tmp_path / "training-data.txt").write_text("\n".join(LINES) + "\n")
    (tmp_path / "test-data.txt").write_text("1,0\tChurch\n")
    return tmp_path


def test_label_numbers_are_lines_of_the_label_file(folder):
    data = load_xmc(folder)
    assert data.labels["text"][:] == LABELS
    assert data.train["label_ids"][:] == [[0, 1], [2], []]
    assert data.train["text"][1] == "LeCun applied backpropagation\tto digits."
    assert data.test["label_ids"][:] == [[1, 0]]
    assert data.load_report["train: queries without labels"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training-data.txt", "0,x\ttext\n", r"training-data.txt:1: expected `0,3<TAB>text`"),
        ("training-data.txt", "0 text\n", r"training-data.txt:1: expected `0,3<TAB>text`"),
        ("training-data.txt", "3\ttext\n", r"training-data.txt:1: label id 3, but there are only 3 labels"),
        ("training-data.txt", None, "has output-labels.txt of PECOS' text2text, but training-data.txt is missing"),
        ("output-labels.txt", None, "has training-data.txt of PECOS' text2text, but output-labels.txt is missing"),
        ("labels.jsonl", "", "which belong to two layouts"),
    ],
)
def test_a_wrong_or_missing_file_is_named(name, content, message, folder):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_xmc(folder)


@pytest.mark.parametrize(
    ("name", "removed", "message"),
    [
        ("training-data.txt", ["output-labels.txt"], "It must also have output-labels.txt, which is missing"),
        (
            "test-data.txt",
            ["output-labels.txt", "training-data.txt"],
            "It must also have output-labels.txt and training-data.txt, which are missing",
        ),
        ("output-labels.txt", [], r"Pass the folder: `load_xmc\('[^']+'\)`\.$"),
    ],
)
def test_a_single_file_needs_its_folder(name, removed, message, folder):
    for other in removed:
        (folder / other).unlink()
    with pytest.raises(ValueError, match=message):
        load_xmc(folder / name)
