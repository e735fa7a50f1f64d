"""Words and pairs of neighbouring words: written by a template, looked up in one table, read by stock modules."""

import subprocess
import sys

import layouts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_xmc import load_xmc, phrase_encoder, standalone, with_phrases, write_phrases
from hf_xmc.encoders.phrases import MAX_WORDS, TEMPLATE, embed_standalone, is_standalone, train_tokenizer

TEXTS = ["a red boat", "a red boat sails", "the sea, under_the sun"]


@pytest.fixture
def encoder():
    return phrase_encoder(write_phrases(TEXTS), embedding_dim=8, vocab_size=100)


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
def test_pairs_stand_after_the_words(text, rewritten):
    assert write_phrases([text]) == [rewritten]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.text(), st.text("a _-.\u3000\x1c"), st.just("w " * (MAX_WORDS + 9))), min_size=1, max_size=3)
)
def test_phrases_are_written_as_the_template_does_it(texts):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}, "[UNK]")))
    conversations = [[{"role": "user", "content": text}] for text in texts]
    assert write_phrases(texts) == tokenizer.apply_chat_template(conversations, chat_template=TEMPLATE, tokenize=False)


def test_the_rest_of_a_very_long_text_is_not_read():
    assert len(write_phrases(["w " * (MAX_WORDS + 9)])[0].split()) == 2 * MAX_WORDS - 1


def test_the_same_texts_give_the_same_tokens():
    """Ties, of which such texts are full, are not left to chance: a seed is to give the same encoder again."""
    texts = write_phrases(["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"])
    first, second = (train_tokenizer(texts, 80).get_vocab() for _ in range(2))
    assert any(token.startswith("##") and len(token) == 4 for token in first), "no ties were decided"
    assert first == second


def test_pairs_that_occur_once_have_no_vector_and_there_is_a_limit():
    texts = write_phrases(["a red boat", "A red boat", "a red car"])
    pairs = {token for token in train_tokenizer(texts, 100).get_vocab() if "_" in token}
    assert pairs == {"a_red", "red_boat"}
    pairs = {token for token in train_tokenizer(texts, 100, num_phrases=1).get_vocab() if "_" in token}
    assert pairs == {"a_red"}


def test_the_embedding_is_the_mean_over_words_and_pairs(encoder):
    table, vocab = encoder[0].embedding.weight, encoder[0].tokenizer.get_vocab()
    expected = table[[vocab[token] for token in ("a", "red", "boat", "a_red", "red_boat")]].mean(0)
    torch.testing.assert_close(encoder.encode(write_phrases(["a RED boat"]), convert_to_tensor=True)[0], expected)


def test_standalone_reads_plain_text_in_stock_sentence_transformers(encoder, tmp_path):
    texts = ["A red boat!", "the boat sails", "unseen words", "", "boat " * (MAX_WORDS + 9)]
    expected = encoder.encode(write_phrases(texts))
    assert expected.any(1).tolist() == [True, True, False, False, True]
    alone = standalone(encoder)
    assert alone.similarity_fn_name == "dot"
    for encode in (alone.encode, alone.encode_query, alone.encode_document):
        np.testing.assert_allclose(encode(texts), expected, rtol=1e-4)  # the sum of 1,000 vectors

    alone.save_pretrained(str(tmp_path / "model"))
    np.save(tmp_path / "expected.npy", expected)
    program = """if True:
        import sys
        sys.modules["hf_xmc"] = None  # importing it would fail
        import numpy as np
        from sentence_transformers import SentenceTransformer
        folder, *texts = sys.argv[1:]
        model = SentenceTransformer(folder + "/model", device="cpu")
        np.testing.assert_allclose(model.encode(texts), np.load(folder + "/expected.npy"), rtol=1e-4)
    """
    command = [sys.executable, "-c", program, str(tmp_path), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_short_way_through_a_standalone_encoder_gives_what_the_long_one_gives(encoder, tmp_path):
    """With positions that were trained, texts that are cut, and after a batch of the long way, which pads."""
    alone = standalone(encoder)
    torch.nn.init.normal_(alone[0].auto_model.positions_embed.weight)
    texts = ["A red boat!", "", "the boat sails, the sea", "\x00", *TEXTS, "xyzzy " * 600]
    alone.save_pretrained(str(tmp_path))
    for one in (alone, SentenceTransformer(str(tmp_path), device="cpu")):
        assert is_standalone(one)
        for limit in (2048, 4):
            one.max_seq_length = limit
            expected = one.encode(texts, convert_to_tensor=True)
            for size in (1024, 3):
                torch.testing.assert_close(embed_standalone(one, texts, size), expected, rtol=1e-4, atol=1e-5)
    one.append(Normalize())
    assert not is_standalone(one)
    assert not is_standalone(encoder)


def test_standalone_refuses_another_encoder(encoder):
    encoder.append(Normalize())
    with pytest.raises(ValueError, match=r"expected one StaticEmbedding, .* got StaticEmbedding, Normalize"):
        standalone(encoder)


def test_with_phrases_rewrites_texts_and_nothing_else(tmp_path):
    layouts.write_reference(tmp_path)
    data = load_xmc(tmp_path)
    phrased = with_phrases(data)
    for name in ("train", "test", "labels"):
        before, after = getattr(data, name), getattr(phrased, name)
        assert list(after["text"]) == write_phrases(before["text"])
        assert after.remove_columns("text")[:] == before.remove_columns("text")[:]
    assert phrased.filter_pairs.keys() == data.filter_pairs.keys()


def test_texts_without_a_word():
    with pytest.raises(ValueError, match="no word was found in the texts"):
        phrase_encoder(write_phrases(["", " _ "]))
