"""Words and word pairs are written by a template, looked up in one table, and read by stock modules."""

import numpy as np
import pytest
import torch
from helpers import dataset_layouts
from helpers.scripts import SENTENCES
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from hf_xmc import XMCModel, load_xmc, phrase_encoder, rewrite_phrases, standalone_encoder, with_phrases
from hf_xmc.encoders.encode import encode_queries
from hf_xmc.encoders.phrases import (
    LEAD_MARKS,
    MAX_LEADS,
    averages_phrases,
    embed_phrases,
    is_phrase_encoder,
    train_tokenizer,
)
from hf_xmc.encoders.rewriting import EARLIER
from hf_xmc.encoders.templates import MAX_WORDS

TEXTS = ["a red boat", "a red boat sails", "the sea, under_the sun"]


@pytest.fixture
def encoder():
    return phrase_encoder(rewrite_phrases(TEXTS), embedding_dim=8, vocab_size=100)


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("A small cat", "A small cat A_small small_cat"),
        ("boat", "boat"),
        ("sea, under_the", "sea , under the sea_, ,_under under_the"),
        ("{{7*7}}", "{ { 7 * 7 } } {_{ {_7 7_* *_7 7_} }_}"),  # a text is read, not run
        ("it's \\", "it ' s \\ it_' '_s s_\\"),
        (" _\n", "[UNK]"),
    ],
)
def test_rewritten_text_has_pairs_after_the_words(text, rewritten):
    written = rewrite_phrases([text])[0].split()
    assert " ".join(piece for piece in written if not piece.startswith(LEAD_MARKS)) == rewritten


def test_rewrite_reads_only_the_beginning_of_a_very_long_text():
    assert len(rewrite_phrases(["w " * (MAX_WORDS + 9)])[0].split()) == 2 * MAX_WORDS - 1 + MAX_LEADS


def test_phrase_tokenizer_is_the_same_for_the_same_texts():
    """Ties, of which such texts are full, are not left to chance: a seed is to give the same encoder again."""
    texts = rewrite_phrases(["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"])
    first, second = (train_tokenizer(texts, 80).get_vocab() for _ in range(2))
    assert any(token.startswith("##") and len(token) == 4 for token in first), "no ties were decided"
    assert first == second


def test_pairs_and_leading_words_that_occur_once_or_exceed_the_limit_have_no_vector():
    texts = rewrite_phrases(["a red boat", "A red boat", "a red car"])
    pairs = {token for token in train_tokenizer(texts, 100).get_vocab() if "_" in token}
    leading = {f"{mark}{word}" for mark in ("_^", "_:", "_::") for word in ("a", "red", "boat")} - {"_::boat"}
    assert pairs == {"a_red", "red_boat"} | leading
    pairs = {token for token in train_tokenizer(texts, 100, num_phrases=1).get_vocab() if "_" in token}
    assert pairs == {"a_red"}


def test_pairs_that_occur_once_have_vectors_that_start_at_zero_if_asked_for():
    texts = rewrite_phrases(["a red boat", "A red boat", "a red car"])
    encoder = phrase_encoder(texts, min_count=1, embedding_dim=8)
    table, vocab = encoder[0].embedding.weight, encoder[0].tokenizer.get_vocab()
    assert {token for token in vocab if "_" in token and token[0] != "_"} == {"a_red", "red_boat", "red_car"}
    assert "_^car" in vocab
    assert table[vocab["red_boat"]].any()
    assert table[vocab["car"]].any()
    assert not table[vocab["red_car"]].any()


def test_embedding_is_the_mean_over_words_pairs_and_leading_words(encoder):
    table, vocab = encoder[0].embedding.weight, encoder[0].tokenizer.get_vocab()
    started = {token for token, row in vocab.items() if table[row].any()}
    assert {"a", "red_boat"} <= started
    assert not any(token.startswith(LEAD_MARKS) for token in started)
    torch.nn.init.normal_(table)  # as if trained
    torch.nn.init.zeros_(table[vocab["[UNK]"]])
    leading = [f"{mark}{word}" for mark in ("_^", "_:", "_::") for word in ("a", "red", "boat")][:-1]
    expected = table[[vocab[token] for token in ("a", "red", "boat", "a_red", "red_boat", *leading)]].mean(0)
    torch.testing.assert_close(encoder.encode(rewrite_phrases(["a RED boat"]), convert_to_tensor=True)[0], expected)


def test_standalone_encoder_reads_plain_text(encoder):
    texts = ["A red boat!", "the boat sails", "unseen words", "", "boat " * (MAX_WORDS + 9)]
    expected = encoder.encode(rewrite_phrases(texts))
    assert expected.any(1).tolist() == [True, True, False, False, True]
    alone = standalone_encoder(encoder)
    assert alone.similarity_fn_name == "dot"
    for encode in (alone.encode, alone.encode_query, alone.encode_document):
        np.testing.assert_allclose(encode(texts), expected, rtol=1e-4)  # the sum of 1,000 vectors


@pytest.mark.parametrize("letters", [False, True])
def test_standalone_encoder_tells_angle_brackets_from_ends_of_words(letters):
    texts = ["<b> in bold: <b>", "a > b: > is more", "<> <> <>"]
    written = rewrite_phrases(texts * 2, letters)
    encoder = phrase_encoder(written, embedding_dim=8)
    torch.nn.init.normal_(encoder[0].embedding.weight)
    np.testing.assert_allclose(standalone_encoder(encoder).encode(texts), encoder.encode(written[:3]), rtol=1e-4)


def test_embed_phrases_equals_the_modules_of_a_standalone_encoder(encoder, tmp_path):
    """With positions that were trained, texts that are cut, and after a batch of the long way, which pads."""
    alone = standalone_encoder(encoder)
    torch.nn.init.normal_(alone[0].auto_model.positions_embed.weight)
    texts = ["A red boat!", "", "the boat sails, the sea", "\x00", *TEXTS, "xyzzy " * 600]
    alone.save_pretrained(str(tmp_path))
    for one in (alone, SentenceTransformer(str(tmp_path), device="cpu")):
        assert averages_phrases(one)
        for limit in (2048, 4):
            one.max_seq_length = limit
            expected = one.encode(texts, convert_to_tensor=True)
            for size in (1024, 3):
                torch.testing.assert_close(embed_phrases(one, texts, size), expected, rtol=1e-4, atol=1e-5)
    one.append(Normalize())
    assert averages_phrases(one)
    expected = one.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(embed_phrases(one, texts, 3), expected, rtol=1e-4, atol=1e-5)
    one.append(Dense(8, 8))
    assert is_phrase_encoder(one)
    assert not averages_phrases(one)
    expected = one.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(encode_queries(one, texts, 3), expected, rtol=1e-4, atol=1e-5)
    assert not is_phrase_encoder(encoder)


@pytest.mark.parametrize("letters", [False, True])
@pytest.mark.parametrize("name", SENTENCES)
def test_each_script_is_read_alike_by_stock_modules_and_explained_by_words(name, letters, tmp_path):
    text = SENTENCES[name][0]
    written = rewrite_phrases([text] * 2, letters)
    encoder = phrase_encoder(written, embedding_dim=4)
    alone = standalone_encoder(encoder)
    alone.save_pretrained(str(tmp_path))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    read = stock.encode([text], convert_to_tensor=True)
    assert "[UNK]" not in encoder[0].tokenizer.encode(written[0]).tokens
    torch.testing.assert_close(read, encoder.encode(written[:1], convert_to_tensor=True))
    torch.testing.assert_close(encode_queries(alone, [text], 3), read)
    assert (stock[0].tokenizer.model_max_length > 5 * MAX_WORDS) == (letters and "<" in written[0])
    why = XMCModel(stock, [text]).explain(text, "0")
    assert why.words_add_up
    named = {word.text.replace("\u200c", ""): word.weight for word in why.words}
    assert {*SENTENCES[name][1].split()} <= {word for word, weight in named.items() if weight}


def test_long_words_are_cut_and_not_unknown():
    words = ["ab" * 200, "\u0928\u093e" * 90]
    tokenizer = train_tokenizer(rewrite_phrases([" ".join(words)] * 2))
    for word in words:
        read = tokenizer.encode(word)
        assert "[UNK]" not in read.tokens
        assert (read.offsets[0][0], read.offsets[-1][1]) == (0, len(word))
    pair = tokenizer.encode(f"{words[0]}_{words[0]}", add_special_tokens=False)
    assert pair.tokens == ["[UNK]"]  # a pair is one token


def test_accents_and_vowel_signs_stay_and_the_dot_of_a_turkish_i_does_not():
    read = train_tokenizer(
        rewrite_phrases(["\u0130zmir \ufb01n r\u00e9sume \u0939\u093f\u0928\u094d\u0926\u0940"])
    ).get_vocab()
    assert {"izmir", "fin", "r\u00e9sume", "\u0939\u093f\u0928\u094d\u0926\u0940"} <= read.keys()


@pytest.mark.parametrize(
    "earlier",
    EARLIER,
    ids=[
        *("letters without leading words", "without leading words"),
        *("letters", "words", "four letters", "whole characters", "with a prompt", "without"),
    ],
)
def test_releases_of_earlier_versions_keep_their_way_of_reading(earlier, encoder, tmp_path):
    alone = standalone_encoder(encoder)
    alone[0].tokenizer.chat_template = earlier.template
    alone.prompts = {"query": "red ", "document": ""}
    alone.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert averages_phrases(loaded)
    texts = ["a red boat, under_the sun", "\u201cred boat\u201d \u8239\u8239", ""]
    expected = loaded.encode_query(texts, convert_to_tensor=True)
    torch.testing.assert_close(encode_queries(loaded, texts, 3), expected, rtol=1e-4, atol=1e-5)
    assert [len(chunk) for chunk in map(earlier.spans, texts)] == [7, 6 if earlier.scripts else 3, 0]


def test_standalone_encoder_keeps_unit_norms(encoder):
    texts = ["a red boat", "under the sun"]
    expected = torch.nn.functional.normalize(standalone_encoder(encoder).encode(texts, convert_to_tensor=True))
    encoder.append(Normalize())
    found = standalone_encoder(encoder).encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected)


def test_standalone_encoder_refuses_other_encoders(encoder):
    encoder.append(Dense(encoder.get_embedding_dimension(), 2))
    with pytest.raises(ValueError, match=r"alone or followed by Normalize, got StaticEmbedding, Dense"):
        standalone_encoder(encoder)


def test_with_phrases_rewrites_only_texts(tmp_path):
    dataset_layouts.write_reference(tmp_path)
    data = load_xmc(tmp_path)
    for given, letters in ((False, False), (None, True)):  # its few words occur once
        phrased = with_phrases(data, given)
        for name in ("train", "test", "labels"):
            before, after = getattr(data, name), getattr(phrased, name)
            assert list(after["text"]) == rewrite_phrases(before["text"], letters)
            assert after.remove_columns("text")[:] == before.remove_columns("text")[:]
        assert phrased.filter_pairs.keys() == data.filter_pairs.keys()


def test_phrase_encoder_refuses_texts_without_a_word():
    with pytest.raises(ValueError, match="must contain at least one word"):
        phrase_encoder(rewrite_phrases(["", " _ "]))
