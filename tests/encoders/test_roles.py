"""Training embeds queries and labels exactly as encode_query and encode_document do."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert, make_heads, make_static_encoder, relevance_of
from helpers.training import tiny_arguments
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from hf_xmc import (
    XMCEvaluator,
    XMCModel,
    XMCTrainer,
    in_batch_dataset,
    in_batch_prompts,
    mine_hard_negatives,
    phrase_encoder,
    rewrite_phrases,
    st_losses,
    standalone_encoder,
)
from hf_xmc.encoders.encode import encode_queries
from hf_xmc.encoders.forward import embed
from hf_xmc.encoders.long_text import chunks_of, max_tokens
from hf_xmc.encoders.roles import prompt_of
from hf_xmc.search.exact import LabelIndex

TEXTS = ["text 1 about boat and sailing boat", "text 4 about animal"]
PROMPTS = {
    "query and document": ({"query": "text ", "document": "about and "}, None),
    "passage": ({"query": "text ", "passage": "old "}, None),
    "corpus": ({"corpus": "red oak "}, None),
    "document before passage": ({"document": "", "passage": "old ", "corpus": "red "}, "corpus"),
    "default": ({"tree": "old oak tree "}, "tree"),
    "default next to an empty query": ({"query": "", "tree": "old oak tree "}, "tree"),
    "default that is missing": ({}, None),
}


@pytest.fixture(params=["static", "bert"])
def encoder(request, tmp_path):
    if request.param == "static":
        return make_static_encoder()
    folder = make_bert(tmp_path / "bert", dropout=0.0)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16, include_prompt=False)], device="cpu")


def trainer_of(encoder, folder, queries, mode="exact", **settings):
    args = tiny_arguments(folder, label_mode=mode, max_steps=1, **settings)
    return XMCTrainer(encoder, args, queries, labels=LABELS)


def embedded_in_training(trainer):
    """The embeddings of all labels, and of the texts as queries."""
    trainer.model.eval()
    with torch.no_grad():
        labels = embed(trainer.model, trainer.negatives.table.features(np.arange(len(LABELS))))
        batch = trainer.data_collator([{"text": text, "label_ids": [0]} for text in TEXTS])
        return labels, embed(trainer.model, trainer.collect_features(batch)[0][0])


def assert_as_encoded(trainer):
    labels, queries = embedded_in_training(trainer)
    torch.testing.assert_close(labels, trainer.model.encode_document(LABELS, convert_to_tensor=True))
    torch.testing.assert_close(queries, trainer.model.encode_query(TEXTS, convert_to_tensor=True))
    return labels, queries


@pytest.mark.parametrize("name", PROMPTS)
def test_training_and_prediction_use_the_same_prompts(encoder, queries, tmp_path, name):
    plain = encoder.encode(LABELS, convert_to_tensor=True), encoder.encode(TEXTS, convert_to_tensor=True)
    encoder.prompts, encoder.default_prompt_name = (
        dict(part) if isinstance(part, dict) else part for part in PROMPTS[name]
    )
    labels, embedded = assert_as_encoded(trainer_of(encoder, tmp_path, queries))
    assert torch.allclose(labels, plain[0]) == (not prompt_of(encoder, "document"))
    assert torch.allclose(embedded, plain[1]) == (not prompt_of(encoder, "query"))


def test_first_prompt_name_takes_precedence():
    encoder = make_static_encoder()
    found = []
    for prompts, default in PROMPTS.values():
        encoder.prompts, encoder.default_prompt_name = dict(prompts), default
        found.append((prompt_of(encoder, "query"), prompt_of(encoder, "document")))
    assert found == [
        ("text ", "about and "),
        ("text ", "old "),
        (None, "red oak "),
        ("red ", ""),
        ("old oak tree ", "old oak tree "),
        ("", "old oak tree "),
        (None, None),
    ]


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
def test_every_label_mode_scores_labels_with_their_prompt(encoder, queries, tmp_path, mode):
    encoder.prompts = {"query": "text ", "passage": "old oak "}
    trainer = trainer_of(encoder, tmp_path, queries, mode, label_sample_fraction=0.4, learning_rate=0.0)
    scored = []
    embed_labels = trainer.negatives.embed

    def recorded(model, candidates):
        embeddings = embed_labels(model, candidates)
        scored.append((candidates.label_ids, embeddings.detach()))
        return embeddings

    trainer.negatives.embed = recorded
    trainer.train()
    ((label_ids, embeddings),) = scored
    expected = trainer.model.encode_document([LABELS[label] for label in label_ids], convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected)
    if mode == "bank":
        remembered = trainer.model.encode_document(
            [LABELS[i] for i in trainer.negatives.label_ids], convert_to_tensor=True
        )
        torch.testing.assert_close(trainer.negatives.embeddings.float(), remembered, rtol=0.01, atol=0.01)


def test_mining_evaluation_and_prediction_use_the_same_prompts(encoder, queries):
    encoder.prompts, encoder.similarity_fn_name = {"query": "text ", "passage": "old oak "}, "dot"
    found, labels = encoder.encode_query(TEXTS), encoder.encode_document(LABELS)
    expected = LabelIndex(labels).search(found, 11)
    assert (expected.label_ids != LabelIndex(encoder.encode(LABELS)).search(encoder.encode(TEXTS), 11).label_ids).any()
    evaluator = XMCEvaluator(TEXTS, relevance_of([[0], [1]]), LABELS)
    np.testing.assert_array_equal(evaluator.predict(encoder).label_ids[:, :11], expected.label_ids)
    mined = mine_hard_negatives(
        encoder, queries.select([0]).map(lambda row: {"text": TEXTS[0], "label_ids": [0]}), LABELS, 9
    )
    np.testing.assert_array_equal(mined[0], [label for label in expected.label_ids[0] if label != 0][:9])
    model = XMCModel(encoder, LABELS)
    for texts in (TEXTS, TEXTS[:1]):
        np.testing.assert_array_equal(model.search(texts, 11).label_ids, expected.label_ids[: len(texts)])


def test_chunks_leave_room_for_the_prompt(tmp_path):
    encoder = SentenceTransformer(modules=[Transformer(str(make_bert(tmp_path))), Pooling(16)], device="cpu")
    encoder.prompts, encoder.default_prompt_name = {"tree": "old oak tree "}, "tree"
    assert max_tokens(encoder) == 32 - 2 - 3
    chunks = chunks_of(encoder, ["dog " * 60])
    read = [encoder.preprocess([chunk], prompt="old oak tree ")["input_ids"][0] for chunk in chunks.texts]
    assert list(map(len, read)) == [32, 32, 2 + 3 + 6]
    encoder[0].query_length = 16  # of sentence-transformers: queries are cut here, documents are not
    assert max_tokens(encoder) == 16 - 2 - 3


def test_standalone_encoder_keeps_the_prompts_of_training(tmp_path):
    trained = phrase_encoder(rewrite_phrases([*TEXTS, *TEXTS, "query words"]), embedding_dim=8, device="cpu")
    trained.prompts, trained.truncate_dim = {"query": "query ", "passage": "words "}, 5
    plain = standalone_encoder(trained)
    for role in ("query", "document"):
        expected = getattr(trained, f"encode_{role}")(rewrite_phrases(TEXTS), convert_to_tensor=True)
        found = getattr(plain, f"encode_{role}")(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, plain.encode(TEXTS, convert_to_tensor=True))
    plain.truncate_dim = None
    torch.testing.assert_close(encode_queries(plain, TEXTS, 1), plain.encode_query(TEXTS, convert_to_tensor=True))


def test_training_truncates_embeddings_like_prediction(encoder, queries, tmp_path):
    encoder.append(Normalize())
    encoder.truncate_dim = 5
    for mode in ("exact", "bank"):
        trainer = trainer_of(encoder, tmp_path, queries, mode)
        labels, _ = assert_as_encoded(trainer)
        assert labels.shape == (11, 5)
        assert not trainer.negatives.normalised  # what is left of a unit vector is shorter
        trainer.train()
        assert XMCModel(trainer.model, LABELS).index.embedding_dim == 5


@pytest.mark.parametrize("name", PROMPTS)
def test_saved_encoder_keeps_the_prompts_of_training(queries, tmp_path, name):
    encoder = make_static_encoder()
    encoder.prompts, encoder.default_prompt_name = dict(PROMPTS[name][0]), PROMPTS[name][1]
    if encoder.default_prompt_name not in encoder.prompts:
        encoder.default_prompt_name = None  # which no encoder is loaded with
    labels, found = encoder.encode_document(LABELS), encoder.encode_query(TEXTS)
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "model")
    assert encoder.prompts == PROMPTS[name][0]
    trainer_of(encoder, tmp_path / "run", queries).save_model(tmp_path / "trained")
    for folder in ("model", "trained"):
        saved = SentenceTransformer(str(tmp_path / folder), device="cpu")
        np.testing.assert_array_equal(saved.encode_document(LABELS), labels)
        np.testing.assert_array_equal(saved.encode_query(TEXTS), found)


def test_in_batch_prompts_give_the_stock_trainer_the_prompts_of_prediction(queries, tmp_path):
    encoder = make_static_encoder()
    encoder.prompts = {"query": "text ", "passage": "old oak "}
    rows = in_batch_dataset(queries, LABELS, hard_negatives=np.full((13, 2), 9))
    args = SentenceTransformerTrainingArguments(str(tmp_path), prompts=in_batch_prompts(encoder, 2), use_cpu=True)
    trainer = SentenceTransformerTrainer(encoder, args, rows, loss=st_losses.DecoupledSoftmaxLoss(encoder))
    batch = [rows[0], rows[1]]
    features, _ = trainer.collect_features(trainer.data_collator(batch))
    for column, inputs in zip(("anchor", "positive", "negative_1", "negative_2"), features, strict=True):
        encode = encoder.encode_query if column == "anchor" else encoder.encode_document
        expected = encode([row[column] for row in batch], convert_to_tensor=True)
        torch.testing.assert_close(embed(encoder, inputs).detach(), expected)


class Shifted(Module):
    """A module that treats queries and documents differently, as adapters for tasks do."""

    forward_kwargs: ClassVar = {"task"}

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, features, task=None):
        shift = {"query": 1.0, "document": -1.0}.get(task, 0.0)
        features["sentence_embedding"] = features["sentence_embedding"] + shift * self.weight
        return features

    def save(self, *args, **kwargs):
        raise NotImplementedError


def test_modules_receive_the_task_if_they_take_it(queries, tmp_path, bert_folder):
    encoder = make_static_encoder()
    encoder.append(Shifted())
    labels, _ = assert_as_encoded(trainer_of(encoder, tmp_path, queries))
    torch.testing.assert_close(labels, encoder.encode(LABELS, convert_to_tensor=True) - 1)
    torch.testing.assert_close(
        encode_queries(encoder, TEXTS[:1], 1), encoder.encode_query(TEXTS[:1], convert_to_tensor=True)
    )
    heads = make_heads(bert_folder)
    heads.prompts["query"] = "old "
    assert_as_encoded(trainer_of(heads, tmp_path, queries))


class Negated(SentenceTransformer):
    def encode_query(self, *args, **kwargs):
        return -super().encode_query(*args, **kwargs)


def test_encoder_with_an_own_encode_query_is_refused(queries, tmp_path):
    encoder = Negated(modules=list(make_static_encoder()), device="cpu")
    with pytest.raises(ValueError, match="encode_query of Negated returns other embeddings"):
        trainer_of(encoder, tmp_path, queries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda encoder: encoder.prompts.update(query="old "),
            "query prompt of the encoder must not change.* '' .* 'old '",
        ),
        (lambda encoder: encoder.prompts.update(document="old "), "document prompt of the encoder must not change"),
        (lambda encoder: setattr(encoder, "truncate_dim", 3), "truncate_dim of the encoder must not change"),
        (
            lambda encoder: setattr(encoder, "similarity_fn_name", "cosine"),
            "similarity_fn_name of the encoder must not",
        ),
    ],
)
def test_encoder_settings_changed_after_construction_are_refused(queries, tmp_path, change, message):
    trainer = trainer_of(make_static_encoder(), tmp_path, queries)
    change(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(queries)


def test_change_from_a_distance_to_the_dot_product_is_reported(queries, tmp_path, caplog):
    encoder = make_static_encoder()
    encoder.similarity_fn_name = "euclidean"
    trainer_of(encoder, tmp_path, queries)
    assert "Changed similarity_fn_name from 'euclidean' to 'dot'" in caplog.text
    assert encoder.similarity_fn_name == "dot"


def test_encoder_with_a_missing_default_prompt_loads_after_saving(encoder, tmp_path):
    encoder.default_prompt_name = "missing"
    expected = encoder.encode(LABELS)
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "model")
    loaded = XMCModel.from_pretrained(tmp_path / "model", device="cpu").encoder
    for encode in (loaded.encode, loaded.encode_query, loaded.encode_document):
        assert (encode(LABELS) == expected).all()
