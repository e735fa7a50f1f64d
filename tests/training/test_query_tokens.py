"""Queries of a static encoder are tokenized once, and batches hold the same tokens as before."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from helpers.training import Recording, tiny_arguments

from hf_xmc import XMCTrainer
from hf_xmc.training import query_tokens
from hf_xmc.training.batching import XMCCollator
from hf_xmc.training.query_tokens import TokenizedCollator, tokenize_once

TEXTS = [*LABELS, "", "\u2603", "red red"]
ROWS = [
    {"text": text, "label_ids": [row, *range(row % 3)], "label_scores": [1.0, *[0.5] * (row % 3)], "row": row}
    for row, text in enumerate(TEXTS)
]


def collator_of(encoder, prompt=""):
    return XMCCollator(encoder.preprocess, prompts={"text": prompt})


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value, name


@pytest.mark.parametrize("prompt", ["", "old tree: "])
@pytest.mark.parametrize("chosen", [[0], [13, 2, 11, 11, 12], range(14)])
def test_a_batch_is_the_same_as_without_the_tokens(prompt, chosen):
    encoder = make_static_encoder()
    plain = collator_of(encoder, prompt)
    made = tokenize_once(plain, encoder, Dataset.from_list(ROWS))
    assert isinstance(made, TokenizedCollator)
    assert_same(made([{"row": row} for row in chosen]), plain([ROWS[row] for row in chosen]))
    assert_same(pickle.loads(pickle.dumps(made.tokens)).features(torch.tensor([2]).numpy()), made.tokens.features([2]))


class Counting(XMCTrainer):
    """A trainer that counts the texts that it tokenizes."""

    def get_data_collator(self, model, args, **kwargs):
        collator, preprocess = super().get_data_collator(model, args, **kwargs), model.preprocess
        self.texts = []

        def counted(texts, **settings):
            self.texts.extend(texts)
            return preprocess(texts, **settings)

        collator.preprocess_fn = counted
        return collator


def test_each_query_is_tokenized_once_for_all_epochs(queries, tmp_path):
    trainer = Counting(make_static_encoder(), tiny_arguments(tmp_path, num_train_epochs=4), queries, labels=LABELS)
    trainer.texts.clear()
    trainer.train()
    read = trainer.texts
    assert len(read) < 2 * len(queries)  # and some once more, to compare
    assert set(read) == set(queries["text"])


def inputs_of(queries, folder, encoder=None, **settings):
    args = tiny_arguments(folder, **{"max_steps": 4, **settings})
    trainer = Recording(encoder or make_static_encoder(), args, queries, labels=LABELS)
    trainer.train()
    return trainer.inputs, trainer


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_sees_the_same_batches(workers, queries, tmp_path, monkeypatch):
    got, trainer = inputs_of(queries, tmp_path, dataloader_num_workers=workers)
    assert type(trainer.data_collator) is XMCCollator
    monkeypatch.setattr("hf_xmc.training.trainer.tokenize_once", lambda collator, *_: collator)
    expected, _ = inputs_of(queries, tmp_path)
    assert len(got) == len(expected) == 4
    for batch, other in zip(got, expected, strict=True):
        assert_same(batch, other)


def test_queries_that_replace_others_have_their_own_tokens(queries, tmp_path):
    trainer = Recording(make_static_encoder(), tiny_arguments(tmp_path, max_steps=1), queries, labels=LABELS)
    trainer.train()
    trainer.inputs.clear()
    trainer.train_dataset = Dataset.from_dict({"text": ["red dog"], "label_ids": [[7, 4]]})
    trainer.train()
    (batch,) = trainer.inputs
    assert torch.equal(batch["text_input_ids"], trainer.model.preprocess(["red dog"])["input_ids"])


def test_an_evaluation_reads_its_own_queries(queries, tmp_path):
    other = Dataset.from_dict({"text": ["red dog"], "label_ids": [[7, 4]]})
    args = tiny_arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, eval_dataset=other)
    trainer.train()
    (batch,) = trainer.get_eval_dataloader()
    assert torch.equal(batch["text_input_ids"], trainer.model.preprocess(["red dog"])["input_ids"])


class Upper(XMCCollator):
    """A collator that changes the texts."""

    def __call__(self, features):
        changed = copy.deepcopy(features)
        for row in changed:
            row["text"] = "old " + row["text"]
        return super().__call__(changed)


def test_a_collator_that_changes_texts_tokenizes_in_each_step():
    encoder = make_static_encoder()
    collator = Upper(encoder.preprocess, prompts={})
    assert tokenize_once(collator, encoder, Dataset.from_list(ROWS)) is collator


def test_queries_of_a_transformer_are_tokenized_in_each_step(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    collator = collator_of(encoder)
    assert tokenize_once(collator, encoder, Dataset.from_list(ROWS)) is collator


def test_features_that_depend_on_the_batch_are_made_in_each_step(monkeypatch):
    encoder = make_static_encoder()
    collator = collator_of(encoder)
    monkeypatch.setattr(query_tokens.RaggedFeatures, "of", classmethod(lambda cls, features: None))
    assert tokenize_once(collator, encoder, Dataset.from_list(ROWS)) is collator
