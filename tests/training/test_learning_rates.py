"""Learning rates of word vectors: of transformers if labels are sampled, and of static encoders by rarity."""

import logging
import math

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, make_router, make_static_encoder
from helpers.training import tiny_arguments
from transformers import HfArgumentParser, PreTrainedModel

from hf_xmc import XMCTrainer, XMCTrainingArguments
from hf_xmc.training.batching import XMCCollator
from hf_xmc.training.learning_rates import token_rates, word_factor

WORDS = "word_embeddings.weight"


def groups(encoder, queries, folder, **settings):
    args = {"learning_rate": 1e-3, "label_mode": "fresh", "label_sample_fraction": 0.25, "use_cpu": True}
    args = XMCTrainingArguments(str(folder), report_to="none", **{**args, **settings})
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    optimizer = trainer.create_optimizer()
    assert args.learning_rate_mapping == settings.get("learning_rate_mapping", {})  # left as it was given
    rates = {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert rates.keys() == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return rates, trainer.negatives.table


def test_word_learning_rate_factor_equals_hand_computed_values():
    assert word_factor(np.array([7, 8, 8]), 0.25) == pytest.approx(2 / (0.25**0.5 + 0.4375**0.5))
    assert word_factor(np.array([3, 3, 5]), 1.0) == 1.0
    assert word_factor(np.array([], dtype=int), 0.25) == 1.0  # an encoder without token ids
    assert word_factor(np.array([2]), 0.01) == pytest.approx(10)
    assert word_factor(np.full(10_000, 2), 0.01) == pytest.approx(1)  # a word that many labels have is always there


def test_factor_lets_adam_go_as_far_with_a_gradient_in_one_step_of_four():
    always, drawn = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    factor = word_factor(np.array([0]), 0.25)
    optimizer = torch.optim.Adam([{"params": [always], "lr": 1e-3}, {"params": [drawn], "lr": factor * 1e-3}])
    for step in range(4000):
        always.grad, drawn.grad = torch.ones(1), torch.full((1,), 4.0 if step % 4 == 0 else 0.0)
        optimizer.step()
    assert float(drawn.detach()) == pytest.approx(float(always.detach()), rel=0.02)
    assert factor == 2


@pytest.mark.parametrize("mode", ["fresh", "bank"])
def test_word_vectors_have_their_own_rate_when_labels_are_sampled(mode, queries, bert_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rates, table = groups(make_bert_encoder(bert_folder), queries, tmp_path, label_mode=mode)
    factor = word_factor(table.tokens, 0.25)
    assert 1.3 < factor < 2
    assert {name for name, rate in rates.items() if rate != 1e-3} == {name for name in rates if name.endswith(WORDS)}
    assert [rate for name, rate in rates.items() if name.endswith(WORDS)] == [pytest.approx(factor * 1e-3)]
    assert f"a learning rate of {factor * 1e-3:.3g}, {factor:.3g} times that of other parameters" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"label_mode": "exact"}, {"label_mode": "mined"}, {"label_sample_fraction": 1.0}, {"optim": "sgd"}],
    ids=["exact", "mined", "all drawn", "sgd"],
)
def test_all_parameters_share_one_rate_when_no_labels_are_sampled(settings, queries, bert_folder, tmp_path, caplog):
    assert set(groups(make_bert_encoder(bert_folder), queries, tmp_path, **settings)[0].values()) == {1e-3}
    assert "learning rate" not in caplog.text


def test_static_encoder_has_one_rate(queries, tmp_path):
    assert set(groups(make_static_encoder(), queries, tmp_path)[0].values()) == {1e-3}


def test_given_rate_of_word_vectors_takes_precedence(queries, bert_folder, tmp_path, caplog):
    given = {"word_embeddings": 2e-3, "position_embeddings": 3e-3}
    rates, _ = groups(make_bert_encoder(bert_folder), queries, tmp_path, learning_rate_mapping=given)
    assert {name.split(".")[-2]: rate for name, rate in rates.items() if rate != 1e-3} == given
    assert "learning rate" not in caplog.text


def test_word_learning_rate_factor_can_be_set(queries, bert_folder, tmp_path):
    rates, _ = groups(
        make_bert_encoder(bert_folder), queries, tmp_path, label_mode="exact", word_learning_rate_factor=3
    )
    assert {name.split(".")[-2]: rate for name, rate in rates.items() if rate != 1e-3} == {
        "word_embeddings": pytest.approx(3e-3)
    }
    assert set(groups(make_bert_encoder(bert_folder), queries, tmp_path, word_learning_rate_factor=1)[0].values()) == {
        1e-3
    }


def test_arguments_are_read_from_a_command_line(tmp_path):
    def parsed(*options):
        return HfArgumentParser(XMCTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), *options]
        )[0]

    assert parsed().word_learning_rate_factor == "auto"
    assert parsed("--word_learning_rate_factor", "auto").word_learning_rate_factor == "auto"
    assert parsed("--word_learning_rate_factor", "1.5", "--label_mode", "bank").word_learning_rate_factor == 1.5
    with pytest.raises(SystemExit):
        parsed("--label_mode", "some")
    for wrong in ("fast", 0, -1.0, None, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="word_learning_rate_factor must be 'auto' or a positive number, got"):
            XMCTrainingArguments(str(tmp_path), word_learning_rate_factor=wrong)


def test_rate_given_for_other_parameters_leaves_that_of_word_vectors(queries, bert_folder, tmp_path):
    rates, table = groups(
        make_bert_encoder(bert_folder), queries, tmp_path, learning_rate_mapping={"position_embeddings": 3e-3}
    )
    raised = {name.split(".")[-2]: rate for name, rate in rates.items() if rate != 1e-3}
    factor = word_factor(table.tokens, 0.25)
    assert raised == {"position_embeddings": 3e-3, "word_embeddings": pytest.approx(factor * 1e-3)}


class Towers(PreTrainedModel):
    """A model that holds another and does not say which vectors are words, as CLIP."""

    _supports_sdpa = True

    def __init__(self, text):
        super().__init__(text.config)
        self.text = text

    def forward(self, **features):
        return self.text(**features)


def test_word_vectors_of_a_multi_tower_model_are_those_of_its_towers(queries, bert_folder, tmp_path):
    encoder = make_bert_encoder(bert_folder)
    encoder[0].model = Towers(encoder[0].model)
    with pytest.raises(NotImplementedError):
        encoder[0].model.get_input_embeddings()
    rates, table = groups(encoder, queries, tmp_path)
    factor = word_factor(table.tokens, 0.25)
    assert {name: rate for name, rate in rates.items() if rate != 1e-3} == {
        "0.model.text.embeddings.word_embeddings.weight": pytest.approx(factor * 1e-3)
    }


def test_word_vectors_that_only_queries_use_keep_the_base_rate(queries, bert_folder, tmp_path):
    rates, _ = groups(make_router(bert_folder), queries, tmp_path)
    (raised,) = [name for name, rate in rates.items() if rate != 1e-3]
    assert raised.endswith(WORDS)
    assert "document" in raised


def test_token_rates_equal_hand_computed_values():
    queries, labels = (np.array([0, 1, 0, 2, 0, 0]), np.array([2, 2, 2])), (np.array([2, 2, 2]), np.array([0, 3]))
    idf = np.array([1 + math.log(6 / 4), 1 + math.log(6 / 2), 1 + math.log(6 / 3)])  # in 3, 1 and 2 of 5 texts
    for exponent in (0.5, 1):
        expected = idf**exponent
        expected = expected * 6 / (3 * expected[0] + expected[1] + 2 * expected[2])
        np.testing.assert_allclose(token_rates([queries, labels], 4, exponent), [*expected, 1])
    np.testing.assert_array_equal(token_rates([queries, labels], 4, 0), np.ones(4))
    np.testing.assert_array_equal(token_rates([(np.array([], np.int64), np.array([0]))], 2, 1.0), np.ones(2))


SPARSE = {"sparse_updates": True, "label_mode": "sampled", "label_sample_fraction": 0.3}


def test_tokens_of_queries_and_labels_learn_by_their_rarity(queries, tmp_path):
    args = tiny_arguments(tmp_path, **SPARSE, word_rarity=0.7, max_steps=2)
    encoder = make_static_encoder()
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS)
    trainer.train()
    texts = [encoder.tokenizer.encode(text, add_special_tokens=False).ids for text in [*queries["text"], *LABELS]]
    expected = token_rates([(np.concatenate(texts).astype(np.int64), np.array([*map(len, texts)]))], 200, 0.7)
    (group,) = trainer.optimizer.param_groups
    assert [id(weight) for weight in group["params"]] == [id(encoder[0].embedding.weight)]
    np.testing.assert_allclose(group["row_rates"], expected[: len(group["row_rates"])], rtol=1e-6)
    assert "Tokens learn at rates of their inverse document frequency to the power of 0.7." in trainer.describe_step()


@pytest.mark.parametrize("settings", [{}, SPARSE])
def test_word_rarity_without_a_use_is_refused(settings, queries, tmp_path):
    class Other(XMCCollator):
        """A collator that may change the texts, so they are tokenized in each step."""

    class OtherTrainer(XMCTrainer):
        data_collator_class = Other

    expected = "queries are not tokenized once" if settings else "word_rarity must be 0 without sparse_updates"
    args = tiny_arguments(tmp_path, **settings, word_rarity=0.5)
    with pytest.raises(ValueError, match=expected):
        OtherTrainer(make_static_encoder(), args, queries, labels=LABELS).train()
    with pytest.raises(ValueError, match=r"word_rarity must be a finite number of at least 0, got -0.1"):
        tiny_arguments(tmp_path, word_rarity=-0.1)
