"""Columns of queries and labels in every wrong form: the same error from everything that reads them."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from helpers.tiny import LABELS, POSITIVES, make_static_encoder

from hf_xmc import (
    XMCData,
    XMCEvaluator,
    XMCModel,
    XMCTrainer,
    XMCTrainingArguments,
    in_batch_dataset,
    mine_hard_negatives,
    relevance_matrix,
)
from hf_xmc.data.columns import label_texts_of, ragged
from hf_xmc.data.positives import positives_of
from hf_xmc.training.batching import XMCCollator

TEXTS = [f"text {number}" for number in range(len(POSITIVES))]
LABEL_TABLE = Dataset.from_dict({"text": LABELS})


@pytest.fixture(scope="module")
def model():
    model = XMCModel(make_static_encoder(), LABELS)
    model.remember(Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES}))
    return model


def trainer(tmp_path, train, labels=LABELS, **kwargs):
    args = XMCTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    return XMCTrainer(make_static_encoder(), args, train, labels=labels, **kwargs)


def readers(model, tmp_path):
    """Everything that takes queries, as functions of them."""
    good = Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES})
    return {
        "XMCTrainer": lambda rows: trainer(tmp_path, rows),
        "XMCTrainer, eval_dataset": lambda rows: trainer(tmp_path, good, eval_dataset=rows),
        "XMCTrainer, eval_dataset by name": lambda rows: trainer(tmp_path, good, eval_dataset={"one": rows}),
        "in_batch_dataset": lambda rows: in_batch_dataset(rows, LABELS),
        "relevance_matrix": lambda rows: relevance_matrix(rows, LABELS),
        "remember": model.remember,
        "tune_memory": model.tune_memory,
        "calibrate": model.calibrate,
        "threshold_for": model.threshold_for,
        "mine_hard_negatives": lambda rows: mine_hard_negatives(model.encoder, rows, LABELS, 3),
        "XMCData, train": lambda rows: XMCData(train=rows, labels=LABEL_TABLE),
        "XMCData, test": lambda rows: XMCData(train=good, labels=LABEL_TABLE, test=rows),
    }


def error_of(use):
    try:
        use()
    except ValueError as error:
        return str(error)
    return "no error"


def changed(row, value, column="label_ids"):
    """The positives with one row of another value; ``Dataset.from_dict`` would guess a type for mixed rows."""
    values = list(POSITIVES) if column == "label_ids" else list(TEXTS)
    values[row] = value
    return values


def scored(row, value):
    scores = [[1.0] * len(ids) for ids in POSITIVES]
    scores[row] = value
    return {"text": TEXTS, "label_ids": POSITIVES, "label_scores": scores}


FLAGS = [[int(label in ids) for label in range(len(LABELS))] for ids in POSITIVES]
WRONG_COLUMNS = {
    "names": (
        {"label_ids": [[LABELS[label] for label in ids] for ids in POSITIVES]},
        "row 0: label_ids must be integers, got string",
    ),
    "digits": (
        {"label_ids": [[str(label) for label in ids] for ids in POSITIVES]},
        r"row 0: label_ids must be integers, got .*'0'",
    ),
    "one number a row": (
        {"label_ids": [len(ids) for ids in POSITIVES]},
        r"row 0: label_ids must be a list of numbers, got int64.* `\[label\]`",
    ),
    "one name a row": ({"label_ids": ["boat"] * 13}, "row 0: label_ids must be a list of numbers, got string"),
    "flags, bool": (
        {"label_ids": [[f == 1 for f in row] for row in FLAGS]},
        "row 0: label_ids must be integers, got bool.*flatnonzero",
    ),
    "flags, 0 and 1": ({"label_ids": FLAGS}, r"row 0: label_ids is \[1, 1, 0.*flags, one per label.*\[0, 1\] for"),
    "floats": (
        {"label_ids": [[float(label) for label in ids] for ids in POSITIVES]},
        "row 0: label_ids must be integers, got double",
    ),
    "NaN": ({"label_ids": [[float("nan")], *POSITIVES[1:]]}, "row 0: label_ids must be integers, got double"),
    "a null": ({"label_ids": changed(3, None)}, "row 3: no label_ids"),
    "a null in a list": ({"label_ids": changed(3, [1, None])}, "row 3: a label id is missing"),
    "negative": ({"label_ids": changed(2, [1, -100])}, "row 2: label id -100, but there are only 11 labels"),
    "out of range": ({"label_ids": changed(2, [4, 11])}, r"row 2: label id 11, .*label_ids go from 0 to 10"),
    "nested": ({"label_ids": [[ids] for ids in POSITIVES]}, "row 0: label_ids must be integers, got list"),
    "scores of another length": (
        scored(5, [1.0]),
        "row 5: label_ids and label_scores must have the same length and order, got 2 and 1",
    ),
    "a negative score": (
        scored(5, [1.0, -2.0]),
        "row 5: label_scores must be finite and at least 0, got -2.0 for label 7",
    ),
    "a score of NaN": (
        scored(5, [float("nan"), 1.0]),
        "row 5: label_scores must be finite and at least 0, got nan for label 6",
    ),
    "an infinite score": (
        scored(5, [float("inf"), 1.0]),
        "row 5: label_scores must be finite and at least 0, got inf for label 6",
    ),
    "a null for a score": (
        scored(5, [1.0, None]),
        "row 5: label_scores must be finite and at least 0, got nan for label 7",
    ),
    "scores that are words": (
        {"label_scores": [["x"] * len(i) for i in POSITIVES]},
        "row 0: label_scores must be numbers, got string",
    ),
    "a text of null": ({"text": changed(4, None, "text")}, "row 4: no text"),
    "texts that are numbers": ({"text": list(range(13))}, "row 0: text must be a string, got int64"),
    "texts that are lists": ({"text": [[text] for text in TEXTS]}, "row 0: text must be a string, got list"),
}


@pytest.mark.parametrize("form", WRONG_COLUMNS)
def test_a_wrong_column_is_the_same_error_everywhere(form, model, tmp_path):
    columns, message = WRONG_COLUMNS[form]
    rows = Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES, **columns})
    remembered = len(model.memory)
    for name, read in readers(model, tmp_path).items():
        if "text" in columns and name == "relevance_matrix":
            continue  # which reads no text
        assert re.search(message, error_of(lambda read=read: read(rows))), name
    assert len(model.memory) == remembered


@pytest.mark.parametrize("missing", ["text", "label_ids"])
def test_a_missing_column_is_named(missing, model, tmp_path):
    rows = Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES}).remove_columns(missing)
    for name, read in readers(model, tmp_path).items():
        if name != "relevance_matrix" or missing != "text":
            with pytest.raises(ValueError, match=rf"no column {missing}, only \w+"):
                read(rows)


NOT_DATA_SETS = {
    "DataFrame": (lambda rows: rows.to_pandas(), r"got DataFrame\. `Dataset\.from_pandas\(frame\)` makes one"),
    "IterableDataset": (lambda rows: rows.to_iterable_dataset(), r"got IterableDataset\. Load it without `streaming"),
    "DatasetDict": (lambda rows: DatasetDict(train=rows), r"got DatasetDict\. Give one of its splits.*\['train'\]"),
    "dict": (lambda rows: rows.to_dict(), r"got dict\. `Dataset\.from_dict` makes one"),
    "list of rows": (lambda rows: rows.to_list(), r"got list\. `Dataset\.from_list\(rows\)` makes one"),
    "arrow table": (lambda rows: rows.to_pandas().pipe(pa.Table.from_pandas), r"got Table\. `Dataset\(table\)` makes"),
    "XMCData": (lambda rows: XMCData(rows, LABEL_TABLE), r"got XMCData\. Give one of its splits"),
    "a transform": (lambda rows: rows.with_transform(lambda batch: batch), "must not have a transform, .*dataset.map"),
}


@pytest.mark.parametrize("kind", NOT_DATA_SETS)
def test_another_kind_of_table_is_refused_with_the_way_to_a_data_set(kind, model, tmp_path):
    make, message = NOT_DATA_SETS[kind]
    rows = Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES})
    for name, read in readers(model, tmp_path).items():
        if "eval_dataset" in name and kind in ("DatasetDict", "dict"):
            continue  # several evaluation sets by name are welcome
        assert re.search(message, error_of(lambda read=read: read(make(rows)))), name


@pytest.mark.parametrize("output", ["torch", "numpy", "pandas", "arrow"])
def test_an_output_format_changes_nothing(output, model, tmp_path, encoder):
    plain = Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES})
    rows = plain.with_format(output, columns=["label_ids"])  # which also hides the texts
    one = trainer(tmp_path, rows, eval_dataset=rows)
    for read in (one.train_dataset, one.eval_dataset):
        assert read.select_columns(["text", "label_ids"]).to_dict() == plain.to_dict()
    batch = next(iter(one.get_train_dataloader()))
    assert sorted(batch["label"][batch["row"] == 5].flatten().tolist())[-2:] == [6, 7]
    assert relevance_matrix(rows, LABELS).nnz == sum(map(len, POSITIVES))
    mined = mine_hard_negatives(model.encoder, rows, LABELS, 3)
    assert torch.equal(mined, mine_hard_negatives(model.encoder, plain, LABELS, 3))
    assert XMCData(rows, LABEL_TABLE).train.to_dict() == plain.to_dict()
    calibrated = XMCModel(encoder, LABELS)
    calibrated.calibrate(rows)
    assert in_batch_dataset(rows, LABELS)[0]["anchor"] == "text 0"


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)], ids=["", "large", "fixed"])
@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.int64()], ids=str)
def test_every_kind_of_integers_and_lists_is_read(lists, kind, tmp_path):
    rows = Dataset(pa.table({"text": ["a", "b"], "label_ids": pa.array([[3, 1], [0, 10]], lists(kind))}))
    assert trainer(tmp_path, rows).train_dataset["label_ids"][:] == [[3, 1], [0, 10]]
    assert relevance_matrix(rows, LABELS).indices.tolist() == [1, 3, 0, 10]


def test_a_repeated_label_counts_once_with_its_largest_score_and_a_score_of_0_is_no_positive(tmp_path, caplog):
    columns = {"text": ["a", "b", "c"], "label_ids": [[4, 2, 4], [], [1, 0]]}
    graded = Dataset.from_dict({**columns, "label_scores": [[1.0, 5.0, 3.0], [], [0.0, 2.0]]})
    offsets, label_ids, scores = positives_of(graded, 11)
    assert (offsets.tolist(), label_ids.tolist(), scores.tolist()) == ([0, 2, 2, 3], [2, 4, 0], [5, 3, 2])
    assert "queries: 1 repeated labels count once, and 1 labels with score 0 are not" in caplog.text
    assert ragged(graded).label_ids.tolist() == [4, 2, 4, 1, 0], "given values were changed"
    data = XMCData(graded, LABEL_TABLE)
    assert data.label_counts().tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert data.relevance("train").toarray()[0, [2, 4]].tolist() == [5, 3]
    weighed = data.weight_positives(0).train
    assert (weighed["label_ids"][:], weighed["label_scores"][:]) == ([[2, 4], [], [0]], [[5, 3], [], [2]])
    trained = trainer(tmp_path, Dataset.from_dict({**columns, "other": [1, 2, 3]})).train_dataset
    assert trained.to_dict() == {"text": [*"abc"], "label_ids": [[4, 2], [], [1, 0]]}


@pytest.mark.parametrize("value", ["a text", 5])
def test_a_column_named_row_means_nothing(value, queries, tmp_path):
    marked = queries.add_column("row", [value] * len(queries))
    made = trainer(tmp_path, queries, eval_dataset=queries)
    expected = made.evaluate()["eval_loss"]
    assert trainer(tmp_path, marked, eval_dataset=marked).evaluate()["eval_loss"] == expected
    made.train_dataset = made.eval_dataset = marked  # unchecked so far
    assert made.evaluate()["eval_loss"] == expected
    rows = torch.cat([batch["row"] for batch in made.get_train_dataloader()])
    assert sorted(rows.tolist()) == list(range(len(queries)))


def test_a_data_set_is_checked_when_it_is_set_later(queries, tmp_path):
    made = trainer(tmp_path, queries, eval_dataset=queries)
    made.train_dataset = made.eval_dataset = Dataset.from_dict({"text": ["a", "b"], "label_ids": [[0], [77]]})
    with pytest.raises(ValueError, match=r"eval_dataset, row 1: label id 77"):
        made.evaluate()
    with pytest.raises(ValueError, match=r"train_dataset, row 1: label id 77"):
        made.train()


def test_rows_of_label_ids_are_not_taken_for_flags():
    def read(label_ids, num_labels):
        return positives_of(Dataset.from_dict({"label_ids": label_ids}), num_labels).label_ids.tolist()

    assert read([[0, 1], [0, 1]], 2) == [0, 1, 0, 1]  # both labels
    assert read([[0], [0]], 1) == [0, 0]
    assert read([[0, 1], [1, 0]], 3) == [0, 1, 1, 0]
    assert read([[0, 1, 2], [2, 1, 0]], 3) == [0, 1, 2, 2, 1, 0]
    assert read([[0, 1], []], 2) == [0, 1]
    for flags in ([[0, 1], [1, 0]], [[0, 0], [0, 1]], [[1, 1]]):
        with pytest.raises(ValueError, match=r"row 0: label_ids is .*flags, one per label"):
            read(flags, 2)


ROWS = [{"text": "a boat", "label_ids": [0, 1]}, {"text": "a car", "label_ids": [2]}]
WRONG_ROWS = {
    "names": ({"label_ids": ["car"]}, "batch, row 1: label_ids is .*'car'"),
    "one number": ({"label_ids": 2}, "batch, row 1: label_ids is 2"),
    "floats": ({"label_ids": [2.5]}, "batch, row [01]: label_ids must be integers, got double"),
    "a null": ({"label_ids": [None]}, "batch, row 1: a label id is missing"),
    "no list": ({"label_ids": None}, "batch, row 1: no label_ids"),
    "padding": ({"label_ids": [2, -100]}, "batch, row 1: label_ids must be at least 0, got -100"),
    "nested": ({"label_ids": [[2]]}, "batch, row 1: label_ids is"),
    "no text": ({"text": None}, "batch, row 1: no text"),
    "a text that is a number": ({"text": 7}, "batch, row 1: text is 7"),
}


@pytest.mark.parametrize("form", WRONG_ROWS)
def test_the_collator_names_the_row_of_its_batch(form, encoder):
    values, message = WRONG_ROWS[form]
    collator = XMCCollator(preprocess_fn=encoder.preprocess, router_mapping={}, prompts={})
    with pytest.raises(ValueError, match=message):
        collator([ROWS[0], {**ROWS[1], **values}])
    with pytest.raises(ValueError, match="batch, row 1: there is no label_ids, only text"):
        collator([ROWS[0], {"text": "a car"}])


@pytest.mark.parametrize("cell", [np.array, torch.tensor, tuple])
def test_the_collator_reads_arrays_and_tensors(cell, encoder):
    collator = XMCCollator(preprocess_fn=encoder.preprocess, router_mapping={}, prompts={})
    rows = [{"text": "a", "label_ids": cell([0, 1])}, {"text": "b", "label_ids": cell([])}]
    if cell is not tuple:  # of no numbers they are of floats
        rows[1]["label_ids"] = rows[0]["label_ids"][:0]
    assert collator(rows)["label"].tolist() == [[0, 1], [-100, -100]]


@pytest.mark.parametrize("wrong", [np.zeros((13, 2)), np.zeros(13, dtype=int), [["boat"]] * 13, [[True]] * 13])
def test_hard_negatives_of_a_wrong_form_are_refused(wrong, queries):
    with pytest.raises(
        ValueError, match=r"`hard_negatives` must be integers of shape \(N, H\), got \S+ of shape \(13,"
    ):
        in_batch_dataset(queries, LABELS, hard_negatives=wrong)


WRONG_LABELS = {
    "one text": ("boat", "got the single text 'boat'. Put it in a list"),
    "a null": (["boat", None], "label 1 must be a string, got a NoneType"),
    "a number": (["boat", 5], "label 1 must be a string, got a int"),
    "a list": (["boat", ["car"]], "label 1 must be a string, got a list"),
    "bytes": (b"boat", "label 0 must be a string, got a int"),
    "none": ([], "must have at least one text"),
    "None": (None, "expected a list of label texts, .*got a NoneType"),
    "a set": ({"boat", "car"}, "expected a list of label texts, .*got a set"),
    "a dict": ({"boat": 0}, "expected a list of label texts, .*got a dict"),
    "a DataFrame": (pd.DataFrame({"text": LABELS}), "a list of label texts, or a Dataset, such as .*got a DataFrame"),
    "a data set without text": (Dataset.from_dict({"name": LABELS}), "no column text, only name"),
    "texts that are numbers": (Dataset.from_dict({"text": [1, 2]}), "labels, row 0: text must be a string, got int64"),
    "a text that is null": (Dataset.from_dict({"text": ["a", None]}), "labels, row 1: no text"),
    "a transform": (LABEL_TABLE.with_transform(lambda batch: batch), "labels must not have a transform"),
    "a DatasetDict": (DatasetDict(train=LABEL_TABLE), "got a DatasetDict"),
}


@pytest.mark.parametrize("form", WRONG_LABELS)
def test_wrong_labels_are_the_same_error_everywhere(form, encoder, tmp_path):
    labels, message = WRONG_LABELS[form]
    queries = Dataset.from_dict({"text": ["a"], "label_ids": [[0]]})
    relevance = relevance_matrix(queries, LABELS)
    uses = [
        lambda: trainer(tmp_path, queries, labels),
        lambda: in_batch_dataset(queries, labels),
        lambda: relevance_matrix(queries, labels),
        lambda: mine_hard_negatives(encoder, queries, labels, 3),
        lambda: XMCEvaluator(["a"], relevance, labels),
    ]
    if form not in ("none", "None"):  # a model may have no labels yet
        uses.append(lambda: XMCModel(encoder, labels))
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()
    if isinstance(labels, pd.DataFrame):
        with pytest.raises(ValueError, match=r"labels must be a Dataset with a column text, got DataFrame"):
            XMCData(queries, labels)


def test_sequences_of_strings_are_labels():
    given = ["boat", "car"]
    for labels in (tuple(given), np.array(given), pd.Series(given, index=[7, 8]), Dataset.from_dict({"x": given})["x"]):
        assert label_texts_of(labels) == given
    formatted = Dataset.from_dict({"text": given}, Features({"text": Value("large_string")})).with_format("numpy")
    assert label_texts_of(formatted) == given


def test_labels_that_cannot_be_told_apart_are_counted(tmp_path, caplog):
    rows = Dataset.from_dict(
        {"text": ["a"], "label_ids": [[0]]}, Features({"text": Value("string"), "label_ids": List(Value("int32"))})
    )
    trainer(tmp_path, rows, ["boat", "car", "boat", " "])
    assert "labels: 1 texts are repeated" in caplog.text
    assert "labels: 1 texts are empty" in caplog.text
