"""Encoders without a Hugging Face tokenizer, or with other features, train and predict like any other."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from helpers.training import tiny_arguments
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    BoW,
    Dense,
    Pooling,
    Router,
    StaticEmbedding,
    WordEmbeddings,
    WordWeights,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import (
    TransformersTokenizerWrapper,
    WhitespaceTokenizer,
)
from torch import nn

from hf_xmc import XMCModel, XMCTrainer
from hf_xmc.encoders.forward import embed
from hf_xmc.encoders.long_text import chunks_of, truncation
from hf_xmc.training.batching import TokenizedLabels

WORDS = ["padding", *sorted({word for label in LABELS for word in label.split()}), "text"]
LONG = "red boat and a blue boat about a dog"  # 5 tokens: "and", "a" and "about" are stop words


def words(max_seq_length=1_000_000, update=True):
    vectors = torch.randn(len(WORDS), 6, generator=torch.Generator().manual_seed(0))
    return WordEmbeddings(WhitespaceTokenizer(WORDS), vectors, update, max_seq_length)


class LettersModule(InputModule):
    """An encoder with features of its own: no tokenizer, no mask, a list with an entry for each text."""

    save_in_root = True
    config_keys = ()

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(26, 6)

    def preprocess(self, inputs, prompt=None, **kwargs):
        counts = [[(prompt or "").count(c) + text.count(c) for c in map(chr, range(97, 123))] for text in inputs]
        return {"letters": torch.tensor(counts).float(), "text_keys": list(inputs)}

    def forward(self, features, **kwargs):
        assert len(features["text_keys"]) == len(features["letters"])
        features["sentence_embedding"] = self.linear(features["letters"])
        return features

    def get_embedding_dimension(self):
        return 6

    def save(self, *args, **kwargs):
        raise NotImplementedError


def towers():
    """Queries by their words, labels by a static encoder with another tokenizer."""
    query, document = [words(4), Pooling(6)], [make_static_encoder(6)[0]]
    return Router.for_query_document(query_modules=query, document_modules=document)


ENCODERS = {
    "words": lambda: [words(), Pooling(6)],
    "lstm": lambda: [words(update=False), WordWeights(WORDS, {"boat": 3.0}), LSTM(6, 3), Pooling(6)],
    "cnn": lambda: [words(), CNN(6, 2, [1, 3]), Pooling(4, "max")],
    "bag of words": lambda: [BoW(WORDS), Dense(len(WORDS), 6)],
    "letters": lambda: [LettersModule()],
    "towers": lambda: [towers()],
}


def encoder_of(name):
    torch.manual_seed(0)
    return SentenceTransformer(modules=ENCODERS[name](), device="cpu")


def trainer_of(encoder, queries, folder, mode="exact"):
    args = tiny_arguments(
        folder, label_mode=mode, label_sample_fraction=0.4, num_random_negatives=4, learning_rate=0.1, max_steps=1
    )
    return XMCTrainer(encoder, args, queries, labels=LABELS)


@pytest.mark.parametrize("mode", ["exact", "fresh", "bank", "mined"])
@pytest.mark.parametrize("name", ENCODERS)
def test_other_encoders_train_in_every_label_mode(queries, tmp_path, name, mode):
    encoder = encoder_of(name)
    before = encoder.encode_document(LABELS), encoder.encode_query(LABELS)
    trainer = trainer_of(encoder, queries, tmp_path, mode)
    trainer.train()
    after = encoder.encode_document(LABELS), encoder.encode_query(LABELS)
    for old, new in zip(before, after, strict=True):
        assert np.abs(old - new).max() > 0.01
    assert np.isfinite(trainer.evaluate(queries)["eval_loss"])


@pytest.mark.parametrize("name", ENCODERS)
def test_token_table_gives_the_features_of_other_encoders(name, caplog):
    encoder = encoder_of(name)
    table = TokenizedLabels(encoder, LABELS, chunk_tokens=4)
    assert ("preprocessed in every step" in caplog.text) == (name in ("bag of words", "letters"))
    for chosen in ([10, 0, 4, 10], [1], range(11)):
        with torch.no_grad():
            found = embed(encoder.eval(), table.features(np.array(chosen)))
        expected = encoder.encode_document([LABELS[label] for label in chosen], convert_to_tensor=True)
        torch.testing.assert_close(found, expected)
    seen = [label for part, _ in table.chunks(np.arange(11)) for label in range(11)[part]]
    assert seen == list(range(11))


@pytest.mark.parametrize("name", ENCODERS)
def test_other_encoders_predict_and_read_long_texts(name):
    encoder = encoder_of(name)
    encoder.similarity_fn_name = "dot"
    model = XMCModel(encoder, LABELS)
    expected = torch.from_numpy(encoder.encode_query([LONG]) @ encoder.encode_document(LABELS).T)
    for long_text in ("truncate",) if name == "towers" else ("truncate", "mean", "max"):
        model.long_text = long_text
        torch.testing.assert_close(torch.from_numpy(model.search([LONG], 11).scores), expected.sort(descending=True)[0])
    model.add_labels(["a pine tree"])
    assert len(model.predict([LONG, "dog"], top_k=12)[0]) == 12


@pytest.mark.parametrize("make", [lambda: [words(4), Pooling(6)], lambda: [towers()]])
def test_long_texts_are_measured_by_the_tokenizer_of_queries(make):
    encoder = SentenceTransformer(modules=make(), device="cpu")
    assert truncation(encoder, [LONG, "a dog"])[1:] == (1, 5 - 4, 4)
    chunks = chunks_of(encoder, [LONG, "a dog"])
    assert chunks.texts == ["red boat and a blue boat", "dog", "a dog"]
    assert chunks.tokens.tolist() == [4, 1, 1]
    encoder.prompts["query"] = "text about "  # one token
    assert truncation(encoder, [LONG])[1:] == (1, 5 - 3, 3)


def test_slow_tokenizer_splits_between_words(bert_folder):
    encoder = make_bert_encoder(bert_folder)
    whole = chunks_of(encoder, ["dog cat " * 40])
    fast = encoder.tokenizer

    class Slow:
        """The tokenizer without a word about where its tokens stand."""

        model_max_length, is_fast = fast.model_max_length, False

        def tokenize(self, text):
            return fast.tokenize(text)

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return fast(*args, **kwargs)

    tokenizer_of = type(encoder[0]).tokenizer
    try:
        type(encoder[0]).tokenizer = property(lambda self: Slow())
        assert chunks_of(encoder, ["dog cat " * 40]).texts == whole.texts
    finally:
        type(encoder[0]).tokenizer = tokenizer_of


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_side_of_the_tokenizer(bert_folder, side, caplog):
    encoder = make_bert_encoder(bert_folder)
    encoder.tokenizer.padding_side = side
    table = TokenizedLabels(encoder, LABELS)
    assert not caplog.records
    expected = encoder.preprocess([LABELS[4], LABELS[10]], task="document")
    for name, tensor in table.features(np.array([4, 10])).items():
        assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor, expected[name])


def test_padding_to_a_fixed_width_is_kept_and_counted(bert_folder, caplog):
    encoder = make_bert_encoder(bert_folder)
    encoder[0].processing_kwargs = {"text": {"padding": "max_length", "max_length": 9}}
    table = TokenizedLabels(encoder, LABELS, chunk_tokens=20)
    assert "preprocessed in every step" in caplog.text
    chunks = [features["input_ids"] for _, features in table.chunks(table.by_length(np.arange(11)))]
    assert all(ids.shape[1] == 9 and ids.numel() <= 20 for ids in chunks)
    assert sum(map(len, chunks)) == 11


def test_encoders_that_cannot_be_trained_are_refused(queries, tmp_path, bert_folder):
    frozen = SentenceTransformer(modules=[words(update=False), Pooling(6)], device="cpu")
    with pytest.raises(ValueError, match="`model` must have a trainable weight"):
        trainer_of(frozen, queries, tmp_path)
    wrapped = TransformersTokenizerWrapper(make_bert_encoder(bert_folder).tokenizer)  # does not know of tasks
    module = WordEmbeddings(wrapped, torch.randn(60, 6), True)
    encoder = SentenceTransformer(modules=[module, Pooling(6)], device="cpu")
    with pytest.raises(ValueError, match="must embed texts with encode_query, which failed"):
        trainer_of(encoder, queries, tmp_path)
    with pytest.raises(ValueError, match="must embed texts with encode_document, which failed"):
        XMCModel(encoder, LABELS)


def test_static_encoder_in_a_router_concatenates_tokens(caplog):
    encoder = encoder_of("towers")
    table = TokenizedLabels(encoder, LABELS)
    assert isinstance(encoder[0].sub_modules["document"][0], StaticEmbedding)
    assert table.features(np.array([10, 0]))["offsets"].tolist() == [0, table.lengths[10]]
    assert not caplog.records
