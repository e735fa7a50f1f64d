"""Mistakes of the first hour: each works, or is an error that shows the line to write."""

import re

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from helpers.tiny import make_static_encoder

from hf_xmc import XMCData, XMCModel, XMCTrainer, XMCTrainingArguments, in_batch_dataset, load_xmc

NAMES = ["boat", "car", "animal"]
TEXTS = ["a sailing boat", "a red car", "an old dog", "a boat and a dog"]
LABELS = [["boat"], ["car"], ["animal"], ["boat", "animal"]]
IDS = [[0], [1], [2], [0, 2]]
FRAME = pd.DataFrame({"title": TEXTS, "subjects": LABELS})


def train(folder, rows, labels=NAMES):
    args = XMCTrainingArguments(str(folder), max_steps=1, report_to="none")
    return XMCTrainer(make_static_encoder(), args, rows, labels=labels)


def rows(label_ids):
    return Dataset.from_dict({"text": TEXTS, "label_ids": label_ids})


MISTAKES = {
    "the trainer gets names": (
        lambda folder: train(folder, rows(LABELS)),
        "train_dataset, row 0: label_ids must be integers, got string: ['boat']. A label id is the "
        "position of the label in the list of labels. For names or uids, write "
        "`XMCData.from_lists(texts, names, vocabulary=labels)`",
    ),
    "the trainer gets one number per row": (
        lambda folder: train(folder, rows([0, 1, 2, 0])),
        "For a single label, write a list of one: `[label]`",
    ),
    "the trainer gets rows of 0 and 1": (
        lambda folder: train(folder, rows([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]])),
        "`np.flatnonzero(row)` gives the ids: [0] for row 0",
    ),
    "the trainer gets a data frame": (
        lambda folder: train(folder, FRAME),
        "train_dataset must be a Dataset with columns text and label_ids, got DataFrame. `Dataset.from_pandas(frame)` "
        "makes one. For label names instead of label_ids, write `XMCData.from_pandas(frame, text=..., labels=...)`",
    ),
    "the trainer gets a list of texts": (
        lambda folder: train(folder, TEXTS),
        "For texts and label names, write `XMCData.from_lists(texts, labels)`",
    ),
    "the trainer gets a file of labels": (
        lambda folder: train(folder, rows(IDS), labels=write(folder / "labels.txt", "boat\ncar\nanimal\n")),
        "labels.txt').labels` reads the labels of a file",
    ),
    "in-batch rows get a data frame": (
        lambda folder: in_batch_dataset(FRAME, NAMES),
        "write `XMCData.from_pandas(frame, text=..., labels=...)`",
    ),
    "the data get a data frame": (
        lambda folder: XMCData(FRAME, Dataset.from_dict({"text": NAMES})),
        "write `XMCData.from_pandas(frame, text=..., labels=...)`",
    ),
    "the data get labels as a list": (
        lambda folder: XMCData(rows(IDS), NAMES),
        'got list. Write `Dataset.from_dict({"text": names})`',
    ),
    "the data get the path of a file": (
        lambda folder: XMCData("books.csv", Dataset.from_dict({"text": NAMES})),
        "`load_xmc('books.csv', text=..., labels=...)` reads a table",
    ),
    "lists get a data frame": (
        lambda folder: XMCData.from_lists(FRAME, LABELS),
        'Write `XMCData.from_pandas(frame, text="title", labels="subjects")`',
    ),
    "lists get one text": (
        lambda folder: XMCData.from_lists("a boat", [["boat"]]),
        "train: texts must be a list, got 'a boat'. Put a single text in a list: `['a boat']`",
    ),
    "lists get one string per text": (
        lambda folder: XMCData.from_lists(TEXTS, ["boat", "car", "animal", "boat;animal"]),
        "train, row 0: labels must be a list of names, got the string 'boat'. Write `labels=[[name] for name in "
        'labels]`, or pass `separator=";"` to `XMCData.from_pandas`',
    ),
    "lists get numbers": (
        lambda folder: XMCData.from_lists(TEXTS, IDS),
        "train, row 0: a label must be a name or a uid, which are strings, got 0. If numbers are uids, write them as "
        "strings: `[[str(uid) for uid in row] for row in labels]`. If they are positions in a list of "
        "names, write `[[names[number] for number in row] for row in labels]`",
    ),
    "lists get a vocabulary file as labels": (
        lambda folder: XMCData.from_lists(TEXTS, "subjects.tsv"),
        "If it is the file of a vocabulary, write `vocabulary='subjects.tsv'`",
    ),
    "lists get a tab in a label": (
        lambda folder: XMCData.from_lists(TEXTS[:1], [["n1\tboat"]]),
        "train, row 0: a label must not contain a tab or a line break, got 'n1\\tboat'",
    ),
    "a vocabulary of lines with tabs": (
        lambda folder: XMCData.from_lists(TEXTS, LABELS, vocabulary=["n1\tboat", "n2\tcar"]),
        "If the tab separates uid and name, pass a dict: {'n1': 'boat', ...}",
    ),
    "a vocabulary of numbers": (
        lambda folder: XMCData.from_lists(TEXTS, LABELS, vocabulary=[0, 1, 2]),
        "If these are label_ids, pass the names of the labels instead, starting with label id 0",
    ),
    "a frame gets numbers": (
        lambda folder: XMCData.from_pandas(FRAME.assign(subjects=IDS), text="title", labels="subjects"),
        "train, row 0: labels in column 'subjects' must be names or uids, which are strings, got [0]",
    ),
    "a frame gets the path of a file": (
        lambda folder: XMCData.from_pandas("books.csv", text="title", labels="subjects"),
        "must be a pandas DataFrame, got the path 'books.csv'. Write `load_xmc('books.csv', text=..., labels=...)`",
    ),
    "a frame gets a vocabulary file as labels": (
        lambda folder: XMCData.from_pandas(FRAME, text="title", labels="subjects.tsv"),
        "train has no column 'subjects.tsv', named in `labels`; its columns are title, subjects. If it is the file of "
        "a vocabulary, write `vocabulary='subjects.tsv'`",
    ),
    "a file gets a vocabulary file as labels": (
        lambda folder: load_xmc(write(folder / "rows.csv", "title,subjects\na,b\n"), text="title", labels="s.tsv"),
        "If it is the file of a vocabulary, write `vocabulary='s.tsv'`",
    ),
    "a file with numbers of labels and no vocabulary of them": (
        lambda folder: load_xmc(write(folder / "rows.csv", "text,label_ids\na,0\n")),
        "rows.csv has no column labels",
    ),
    "the model gets a file of labels": (
        lambda folder: XMCModel(make_static_encoder(), str(write(folder / "labels.txt", "boat\ncar\n"))),
        "labels.txt').labels` reads the labels of a file",
    ),
    "the model gets a data frame of labels": (
        lambda folder: XMCModel(make_static_encoder(), FRAME),
        "expected a list of label texts, or a Dataset, such as from Dataset.from_pandas",
    ),
}


def write(path, content):
    path.write_text(content)
    return path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_that_shows_the_line_to_write(mistake, tmp_path):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series(LABELS),
        [tuple(names) for names in LABELS],
        [set(names) for names in LABELS],
        [np.array(names) for names in LABELS],
        np.array([*map(list, LABELS)], dtype=object),
    ],
    ids=["series", "tuples", "sets", "arrays", "array of lists"],
)
def test_labels_in_other_containers_work(labels):
    data = XMCData.from_lists(pd.Series(TEXTS), labels, vocabulary=NAMES)
    assert data.train["label_ids"][:] == IDS


def test_what_is_made_of_names_trains(tmp_path):
    data = XMCData.from_lists(TEXTS, LABELS, vocabulary=NAMES)
    trainer = train(tmp_path, data.train, data.labels)
    trainer.train()
    assert XMCModel(trainer.model, data.labels).predict("a sailing boat", 1)[0].uid == "boat"
