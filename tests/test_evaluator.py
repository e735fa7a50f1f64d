"""The evaluator: the same numbers as encoder, index and metrics by hand, in a trainer too."""

import csv

import numpy as np
import pytest
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES, relevance_of

from hf_xmc import LabelIndex, XMCData, XMCEvaluator
from hf_xmc.metrics.ranking import evaluate_ranking


@pytest.fixture
def data(queries):
    return XMCData(
        train=queries,
        labels=Dataset.from_dict({"uid": LABELS, "text": LABELS}),
        test=queries,
        filter_pairs={"test": np.array([[0, 1], [12, 4]])},
    )


def test_evaluator_equals_encoder_index_and_metrics(encoder, data):
    evaluator = XMCEvaluator.from_data(data, "test")
    found = evaluator(encoder)
    embedded = LabelIndex(encoder.encode(LABELS, convert_to_tensor=True))
    best = embedded.search(encoder.encode(data.test["text"]), 11, exclude=data.filter_pairs["test"])
    expected = evaluate_ranking(best.label_ids, relevance_of(POSITIVES), ndcg_at=(5,), recall_at=(10,))
    assert {name: found[name] for name in expected} == expected
    assert found["P@1"] < 1, "a perfect score would hide a wrong one"


def test_evaluator_accepts_names_of_labels(encoder, data):
    names = [[LABELS[label] for label in labels] for labels in POSITIVES]
    by_name = XMCEvaluator(data.test["text"], names, LABELS)
    by_number = XMCEvaluator(data.test["text"], relevance_of(POSITIVES), LABELS)
    assert by_name(encoder) == by_number(encoder)
    with pytest.raises(ValueError, match=r"queries, row 0: label 'boats' is not in .* Did you mean 'boat'"):
        XMCEvaluator(["a"], [["boats"]], LABELS)


def test_evaluator_uses_filter_pairs_and_propensities(encoder, data):
    plain = XMCEvaluator(data.test["text"], relevance_of(POSITIVES), LABELS)
    filtered = XMCEvaluator.from_data(data, "test")
    assert "PSP@1" not in plain(encoder)
    assert filtered(encoder)["R@10"] < plain(encoder)["R@10"]  # two positives may no longer be found
    assert -1 in filtered.predict(encoder).label_ids


def test_metrics_are_prefixed_by_the_name_and_written_to_the_card(encoder, data):
    evaluator = XMCEvaluator.from_data(data, "test", name="small")
    found = evaluator(encoder)
    assert {"small_P@1", "small_nDCG@5"} <= set(found)
    assert evaluator.primary_metric == "small_P@5"
    assert encoder.model_card_data.eval_results_dict[evaluator] == found


def test_invalid_shapes_and_presets_are_refused(data):
    with pytest.raises(ValueError, match=r"`relevance` must have shape \(2, 11\), .* got \(13, 11\)"):
        XMCEvaluator(["a", "b"], relevance_of(POSITIVES), LABELS)
    with pytest.raises(ValueError, match="there is no split 'validation', only train, test"):
        XMCEvaluator.from_data(data, "validation")
    with pytest.raises(ValueError, match="one of default, amazon, wikipedia, got 'amazn'"):
        XMCEvaluator.from_data(data, "test", propensity="amazn")


def test_evaluator_appends_a_row_per_call_to_a_csv_file(encoder, data, tmp_path, caplog):
    caplog.set_level("INFO", "hf_xmc")
    make = XMCEvaluator.from_data
    found = make(data, "test", name="small")(encoder, str(tmp_path / "eval"), epoch=0.5, steps=7)
    make(data, "test", name="small")(encoder, tmp_path / "eval", epoch=1, steps=14)  # a process that resumes
    file = tmp_path / "eval" / "Extreme-Multilabel-Classification_evaluation_small_results.csv"
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["epoch"], row["steps"]) for row in rows] == [("0.5", "7"), ("1", "14")]
    for row in rows:
        assert {f"small_{name}": float(row[name]) for name in row if name not in ("epoch", "steps")} == found
    assert {"P@1", "PSnDCG@5", "PSR@10", "num_empty"} <= rows[0].keys()

    before = file.read_text()
    make(data, "test", name="small", p_at=[2])(encoder, tmp_path / "eval")
    assert file.read_text() == before, "rows stand under the columns of others"
    assert len(file.with_name(f"{file.stem}-2.csv").read_text().splitlines()) == 2
    assert "have different columns" in caplog.text
    make(data, "test", write_csv=False)(encoder, tmp_path / "none")
    make(data, "test")(encoder)
    assert not (tmp_path / "none").exists()


def test_card_names_the_task_in_full(encoder, data, tmp_path):
    XMCEvaluator.from_data(data, "test", name="small")(encoder)
    encoder.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "name: Extreme Multilabel Classification" in card
    assert "XMC" not in card.split("---")[1]


def test_name_with_slashes_gives_one_file_name(encoder, data, tmp_path):
    XMCEvaluator.from_data(data, "test", name="org/data")(encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [
        "Extreme-Multilabel-Classification_evaluation_org_data_results.csv"
    ]


WRONG = {
    "primary_metric": (
        {"primary_metric": "P@7"},
        r"`primary_metric` must be one of P@1, P@3, P@5, .*got 'P@7'",
    ),
    "a k of 0": ({"p_at": (0, 5)}, "`k` must be a whole number of at least 1, got 0"),
    "a fraction": ({"recall_at": (10.0,)}, r"`k` must be a whole number of at least 1, got 10\.0"),
    "propensities": ({"inverse_propensity": [1.0, 2.0]}, r"of the 11 labels of `relevance`, got shape \(2,\)"),
    "filter pairs": ({"filter_pairs": np.array([[0, 11]])}, "filter_pairs has row 0, label 11, but there are 13 rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_arguments_are_refused_at_construction(case, data):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        XMCEvaluator(data.test["text"], relevance_of(POSITIVES), LABELS, **arguments)


def test_queries_without_any_positive_are_refused(data):
    empty = relevance_of([[] for _ in POSITIVES])
    with pytest.raises(ValueError, match="`relevance` must have a positive for at least one query"):
        XMCEvaluator(data.test["text"], empty, LABELS)


def test_primary_metric_is_one_of_the_metrics(encoder, data):
    evaluator = XMCEvaluator.from_data(data, "test", p_at=(1, 2))
    assert evaluator.metric_names[:3] == ["P@1", "P@2", "PSP@1"]
    assert evaluator.primary_metric in evaluator(encoder)
