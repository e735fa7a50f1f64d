"""Metrics of a finished model, with as few searches as possible."""

import numpy as np
import pytest
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES, make_static_encoder

from hf_xmc import XMCData, XMCModel
from hf_xmc.experiment import measure
from hf_xmc.experiment.settings import ExperimentSettings
from hf_xmc.model.new_labels import new_label_ids


@pytest.mark.parametrize("num_known", [11, 8])
def test_metrics_are_those_of_predict_and_thresholds_those_of_the_model(queries, monkeypatch, num_known):
    known = [[label for label in ids if label < num_known] for ids in POSITIVES]
    train = Dataset.from_dict({"text": queries["text"][:], "label_ids": known})
    asked = Dataset.from_dict({"text": [f"{text} again" for text in queries["text"]], "label_ids": POSITIVES})
    pairs = {"test": np.array([[0, POSITIVES[0][0]], [2, 4]]), "validation": np.array([[1, 3]])}
    labels = Dataset.from_dict({"text": LABELS, "seen": [label < num_known for label in range(11)]})
    data = XMCData(train, labels, validation=asked, test=asked, filter_pairs=pairs)
    model, settings = XMCModel(make_static_encoder(), labels), ExperimentSettings(data="data", memory_tolerance=0.0)
    searches, search = [], XMCModel.search
    monkeypatch.setattr(XMCModel, "search", lambda *args, **kwargs: searches.append(args) or search(*args, **kwargs))
    metrics = measure.complete(model, data, data, settings)
    monkeypatch.undo()
    expected = measure.evaluate(model, data, "test", settings.propensity)
    assert metrics["memory"] == expected["labels"]
    assert metrics["deciles"] == expected["deciles"]
    for row in metrics["calibration"]["thresholds"]:
        pairs = data.filter_pairs["validation"]
        assert row["threshold"] == model.threshold_for(data.validation, precision=row["wanted"], exclude=pairs)
    assert len(metrics["calibration"]["thresholds"]) >= 1
    assert len(new_label_ids(model.label_texts, model.memory)) == 11 - num_known
    if num_known == 11:  # once each: labels alone; to calibrate; thresholds; test; and the intervals
        assert len(searches) == 5
