"""The evaluator: the same numbers as encoder, index and metrics by hand, in a trainer too."""

import numpy as np
import pytest
from conftest import LABELS, POSITIVES, relevance_of
from datasets import Dataset

from hf_xmc import ExtremeMultilabelClassificationEvaluator, LabelIndex, XMCData
from hf_xmc.metrics import evaluate_ranking


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
