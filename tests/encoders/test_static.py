"""The encoder that needs no download."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from hf_xmc import XMCTrainer, XMCTrainingArguments, phrase_encoder, rewrite_phrases, standalone_encoder, static_encoder
from hf_xmc.encoders.static import hold_unknown

TEXTS = ["a red boat", "a red boat sails", "a blue car"]


def unknown_row(encoder):
    return encoder[0].embedding.weight[encoder[0].tokenizer.token_to_id("[UNK]")]


def train(encoder, texts, folder, **settings):
    queries = Dataset.from_dict({"text": texts, "label_ids": [[n % 3] for n in range(len(texts))]})
    args = XMCTrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=0.1,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **settings,
    )
    XMCTrainer(encoder, args, queries, labels=TEXTS).train()


def test_embedding_is_the_mean_of_lowercased_tokens():
    encoder = static_encoder(["a red boat", "a blue car"], embedding_dim=8, vocab_size=100)
    red, boat, both = encoder.encode(["red", "boat", "RED boat"], convert_to_tensor=True)
    torch.testing.assert_close((red + boat) / 2, both)
    assert encoder.similarity_fn_name == "dot"


def test_static_encoder_is_the_same_for_the_same_seed():
    texts = ["a red boat", "a blue car"]
    one, same, other = (static_encoder(texts, embedding_dim=8, seed=seed)[0].embedding.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_static_encoder_refuses_texts_without_a_word():
    with pytest.raises(ValueError, match="must contain at least one word"):
        static_encoder(["", "  "])


def test_unknown_words_add_nothing_to_the_embedding(tmp_path):
    encoder = static_encoder(TEXTS, embedding_dim=8, vocab_size=100, device="cpu")
    train(encoder, ["a red boat \U0001f642", "\U0001f642", "blue \u6587 sails", "car"], tmp_path / "run")
    encoder.save_pretrained(str(tmp_path / "saved"))
    for one in (encoder, SentenceTransformer(str(tmp_path / "saved"), device="cpu")):
        boat, mixed, *unknown = one.encode(["red boat", "red\u6587 boat \U0001f642", "\U0001f642", "\u4e2d\u6587", ""])
        assert boat.any()
        assert mixed.tolist() == boat.tolist()  # not in the mean either
        assert not any(row.any() for row in unknown)
        assert not unknown_row(one).any()
    spelled = encoder[0].tokenizer.encode("[UNK]").ids
    assert encoder[0].tokenizer.token_to_id("[UNK]") not in spelled


def test_unused_token_starts_at_zero_and_learns(tmp_path):
    encoder = static_encoder(["abc abc ab", "ad"] * 3, embedding_dim=8, vocab_size=100, device="cpu")
    tokenizer, table = encoder[0].tokenizer, encoder[0].embedding.weight
    used = {number for text in ("abc", "ab", "ad") for number in tokenizer.encode(text).ids}
    unused = sorted(set(range(len(table))) - used)
    assert tokenizer.token_to_id("c") in unused  # it only served to build "abc"
    assert not table[unused].any()
    assert table[sorted(used)].any(1).all()
    train(encoder, ["c", "c abc", "ad"], tmp_path)
    assert table[tokenizer.token_to_id("c")].any()


@pytest.mark.parametrize("mode", ["exact", "bank"])
def test_unknown_token_of_phrases_stays_zero_and_counts_in_the_mean(mode, tmp_path):
    encoder = phrase_encoder(rewrite_phrases(TEXTS), embedding_dim=8, vocab_size=100, device="cpu")
    encoder.save_pretrained(str(tmp_path / "start"))
    texts = rewrite_phrases(["boat red a", "a red boat", "\u6587 car", "\u6587"])  # pairs that have no vector
    copies = [encoder, pickle.loads(pickle.dumps(copy.deepcopy(encoder))), SentenceTransformer(str(tmp_path / "start"))]
    for one in copies:
        before = one[0].embedding.weight.detach().clone()
        train(one, texts, tmp_path / "run", label_mode=mode, label_sample_fraction=0.9)
        table = one[0].embedding.weight
        assert not unknown_row(one).any()
        assert not torch.equal(table, before)
        stock = StaticEmbedding(one[0].tokenizer, embedding_weights=table.detach().clone())
        expected = stock(stock.preprocess(texts))["sentence_embedding"]
        torch.testing.assert_close(one.encode(texts, convert_to_tensor=True), expected)
        ids = one[0].tokenizer.encode(texts[2]).ids
        torch.testing.assert_close(expected[2], table[ids].mean(0))
        assert not expected[3].any()
        alone = standalone_encoder(one)
        torch.testing.assert_close(alone.encode("\u6587 car", convert_to_tensor=True), expected[2])
        assert not alone.encode(["\u6587", "", " _"]).any()


def test_unknown_token_stays_zero_with_any_optimizer():
    encoder = phrase_encoder(rewrite_phrases(TEXTS), embedding_dim=8, vocab_size=100, device="cpu")
    features = encoder.preprocess(["boat_red car", "red"])
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        steps = optimizer(encoder.parameters(), lr=0.1, weight_decay=0.1, **settings)
        for _ in range(2):
            steps.zero_grad()
            encoder(dict(features))["sentence_embedding"].square().sum().backward()
            steps.step()
        assert not unknown_row(encoder).any()


def test_unknown_token_with_a_given_vector_keeps_it():
    encoder = phrase_encoder(rewrite_phrases(TEXTS), embedding_dim=8, vocab_size=100, device="cpu")
    stock = StaticEmbedding(encoder[0].tokenizer, embedding_dim=8)
    hold_unknown(SentenceTransformer(modules=[stock], device="cpu"))
    assert stock.embedding.padding_idx is None
