"""The changes of recipes/ablations.py: each is what its name says."""

import pytest
import torch
from datasets import Dataset
from helpers import dataset_layouts
from helpers.tiny import RECIPES

from hf_xmc import XMCData, losses, static_encoder
from hf_xmc.experiment.settings import ExperimentSettings


@pytest.fixture
def ablations(script):
    return script("ablations")


@pytest.fixture
def data():
    train = Dataset.from_dict({"text": ["a red boat, small!", "the cat"], "label_ids": [[0, 1], [2]]})
    labels = Dataset.from_dict({"uid": ["x", "y", "z"], "text": ["boat", "red", "cat (animal)"]})
    return XMCData(train=train, labels=labels, test=train)


def test_token_dropout_replaces_a_fifth_of_the_tokens_in_training_only(ablations):
    words = [f"word{number}" for number in range(500)]
    encoder = static_encoder(words, embedding_dim=4)
    masked = ablations.words_masked(encoder)[0].embedding
    unknown = encoder[0].tokenizer.token_to_id("[UNK]")
    known = torch.arange(2000) % (masked.num_embeddings - 1) + 1
    offsets = torch.arange(2000)
    torch.manual_seed(0)
    masked.train()
    hidden = (masked(known, offsets) == masked.weight[unknown]).all(1)
    assert hidden.double().mean() == pytest.approx(0.2, abs=0.05)
    masked.eval()
    torch.testing.assert_close(masked(known, offsets), masked.weight[known])


def test_label_texts_become_queries_of_their_label(ablations, data):
    more = ablations.label_texts_as_queries(data)
    assert more.train["text"][:] == ["a red boat, small!", "the cat", "boat", "red", "cat (animal)"]
    assert more.train["label_ids"][:] == [[0, 1], [2], [0], [1], [2]]
    assert more.test is data.test


def test_punctuation_becomes_spaces_in_all_texts(ablations, data):
    bare = ablations.no_punctuation(data)
    assert bare.train["text"][0] == bare.test["text"][0] == "a red boat  small "
    assert bare.labels["text"][2] == "cat  animal "
    assert bare.validation is None


@pytest.mark.parametrize("name", ["half_softmax", "half_soft_top_5"])
def test_mixed_loss_is_the_mean_of_two_losses(ablations, name):
    recipe = ExperimentSettings(data="", temperature=0.5)
    queries, labels = torch.randn(4, 6), torch.randn(9, 6)
    positives = torch.tensor([[0, 1], [2, -100], [3, 4], [8, 5]])
    other = losses.SoftmaxLoss(0.5) if name == "half_softmax" else losses.SoftTopKLoss(k=5, temperature=0.5)
    expected = (losses.DecoupledSoftmaxLoss(0.5)(queries, labels, positives) + other(queries, labels, positives)) / 2
    torch.testing.assert_close(getattr(ablations, name)(recipe)(queries, labels, positives), expected)


def test_ablation_run_prints_a_row_of_the_table(ablations, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_reference(tmp_path / "data")
    flags = ["--embedding_dim", "8", "--num_train_epochs", "1", "--validation_size", "0.3", "--use_cpu", "true"]
    where = [RECIPES / "static.yaml", "--data", tmp_path / "data", "--output_dir", tmp_path / "out"]
    ablations.main("label_texts_as_queries", [*map(str, where), *flags])
    name, *values = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert name == "label_texts_as_queries"
    assert len(values) == 9
    assert all(0 <= float(value) <= 100 for value in values)
