"""The evaluator: the same numbers as encoder, index and metrics by hand, in a trainer too."""

import csv

import numpy as np
import pytest
from conftest import LABELS, POSITIVES, relevance_of
from datasets import Dataset

from hf_xmc import ExtremeMultilabelClassificationEvaluator, LabelIndex, XMCData
from hf_xmc.metrics.ranking import evaluate_ranking


@pytest.fixture
def data(queries):
    return XMCData(
        train=queries,
        labels=Dataset.from_dict({"label_id": LABELS, "text": LABELS}),
        test=queries,
        filter_pairs={"test": np.array([[0, 1], [12, 4]])},
    )


def test_it_is_encoder_index_and_metrics(encoder, data):
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(data, "test")
    found = evaluator(encoder)
    embedded = LabelIndex(encoder.encode(LABELS, convert_to_tensor=True))
    best = embedded.search(encoder.encode(data.test["text"]), 11, exclude=data.filter_pairs["test"])
    expected = evaluate_ranking(best.label_ids, relevance_of(POSITIVES), ndcg_at=(5,), recall_at=(10,))
    assert {name: found[name] for name in expected} == expected
    assert found["P@1"] < 1, "a perfect score would hide a wrong one"


def test_filter_pairs_and_propensities_count(encoder, data):
    plain = ExtremeMultilabelClassificationEvaluator(data.test["text"], relevance_of(POSITIVES), LABELS)
    filtered = ExtremeMultilabelClassificationEvaluator.from_data(data, "test")
    assert "PSP@1" not in plain(encoder)
    assert filtered(encoder)["R@10"] < plain(encoder)["R@10"]  # two positives may no longer be found
    assert -1 in filtered.predict(encoder).label_ids


def test_the_name_stands_before_the_metrics_and_the_card_learns_of_them(encoder, data):
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(data, "test", name="small")
    found = evaluator(encoder)
    assert {"small_P@1", "small_nDCG@5"} <= set(found)
    assert evaluator.primary_metric == "small_P@5"
    assert encoder.model_card_data.eval_results_dict[evaluator] == found


def test_shapes_and_presets_are_checked(data):
    with pytest.raises(ValueError, match=r"shape \(13, 11\); expected \(2, 11\)"):
        ExtremeMultilabelClassificationEvaluator(["a", "b"], relevance_of(POSITIVES), LABELS)
    with pytest.raises(ValueError, match="there is no split 'validation'; this data set has train, test"):
        ExtremeMultilabelClassificationEvaluator.from_data(data, "validation")
    with pytest.raises(ValueError, match="one of default, amazon, wikipedia, got 'amazn'"):
        ExtremeMultilabelClassificationEvaluator.from_data(data, "test", propensity="amazn")


def test_each_call_with_a_folder_appends_a_row_to_a_csv_file(encoder, data, tmp_path, caplog):
    make = ExtremeMultilabelClassificationEvaluator.from_data
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
    assert "has other columns" in caplog.text
    make(data, "test", write_csv=False)(encoder, tmp_path / "none")
    make(data, "test")(encoder)
    assert not (tmp_path / "none").exists()


def test_a_name_with_slashes_is_one_file_name(encoder, data, tmp_path):
    ExtremeMultilabelClassificationEvaluator.from_data(data, "test", name="org/data")(encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [
        "Extreme-Multilabel-Classification_evaluation_org_data_results.csv"
    ]


WRONG = {
    "primary_metric": ({"primary_metric": "P@7"}, r"primary_metric must be one of P@1, P@3, P@5, nDCG@5, .*got 'P@7'"),
    "a k of 0": ({"p_at": (0, 5)}, "k must be a whole number of at least 1, got 0"),
    "a fraction": ({"recall_at": (10.0,)}, r"k must be a whole number of at least 1, got 10\.0"),
    "propensities": ({"inverse_propensity": [1.0, 2.0]}, r"shape \(2,\), but relevance has 11 labels"),
    "filter pairs": ({"filter_pairs": np.array([[0, 11]])}, "filter_pairs names row 0, label 11; there are 13 rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_fail_at_the_first_evaluation_fails_at_construction(case, data):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ExtremeMultilabelClassificationEvaluator(data.test["text"], relevance_of(POSITIVES), LABELS, **arguments)


def test_queries_of_which_none_has_a_positive(data):
    empty = relevance_of([[] for _ in POSITIVES])
    with pytest.raises(ValueError, match="no query has a positive in relevance"):
        ExtremeMultilabelClassificationEvaluator(data.test["text"], empty, LABELS)


def test_the_primary_metric_is_among_the_metrics(encoder, data):
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(data, "test", p_at=(1, 2))
    assert evaluator.metric_names[:3] == ["P@1", "P@2", "PSP@1"]
    assert evaluator.primary_metric in evaluator(encoder)
