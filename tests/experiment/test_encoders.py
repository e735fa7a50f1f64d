"""The encoder of an experiment is built from its settings and the training data."""

import logging

import pytest

from hf_xmc import XMCData
from hf_xmc.experiment import encoders
from hf_xmc.experiment.encoders import build_encoder
from hf_xmc.experiment.settings import ExperimentSettings


@pytest.mark.parametrize("few", [True, False])
def test_pairs_that_occur_once_have_vectors_if_there_are_few_training_texts(few, monkeypatch, caplog):
    monkeypatch.setattr(encoders, "FEW_TEXTS", 3 if few else 2)
    data = XMCData.from_lists(["a red boat red_boat", "a red car"], [["x"], ["y"]])
    settings = ExperimentSettings(data="data", model="phrases", embedding_dim=8, vocab_size=50, num_phrases=50)
    with caplog.at_level(logging.INFO, logger=encoders.__name__):
        vocab = build_encoder(settings, data, seed=0)[0].tokenizer.get_vocab()
    assert ("red_boat" in vocab) == few
    assert bool(caplog.records) == few
