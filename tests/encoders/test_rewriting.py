"""Texts in any script are rewritten as words and their combinations, in Python as in the chat template."""

import hashlib

import pytest
from helpers.scripts import SENTENCES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_xmc import rewrite_phrases
from hf_xmc.encoders.characters import FIRST
from hf_xmc.encoders.rewriting import (
    EARLIER,
    REWRITINGS,
    WITH_LETTERS,
    WORDS,
    needs_letters,
    unseen_share,
)
from hf_xmc.encoders.templates import MAX_WORDS

LETTERS = (  # of all kinds
    "aZ9 _-'|\u200b\u200b\u1780\u200d\u00ad\u2061\u2062\u0300\u0e01\u0e48\u0e33\u0e50\u4e00\u3042\u3099\u30fb\uff3f"
    "\uff9e\u0915\u093e\u0661\u3000\x1c"
)


@pytest.mark.parametrize("name", SENTENCES)
def test_words_of_each_script(name):
    text, words = SENTENCES[name]
    assert [word.lstrip(FIRST) for word in WORDS.words(text)] == words.split()
    assert rewrite_phrases([text])[0].startswith(words)
    read = [text[start:stop].replace("\u200c", "") for start, stop in WORDS.spans(text)]
    assert read == words.split()


def test_neighbouring_characters_of_a_script_without_spaces_follow_the_pairs():
    assert rewrite_phrases(["a 使用船，航"])[0].split() == [
        *("a", "使", "用", "船", "，", "航"),
        *("a_使", "使_用", "用_船", "船_，", "，_航"),
        *("_^a", "_^使", "_^用", "_^船", "_^，", "_^航", "_:a", "_:使", "_:用", "_:船", "_::a", "_::使"),
        *("_[使用", "_使用船", "_用船]", "_[使用船", "_使用船]"),
        *("_[航]",),
    ]
    assert rewrite_phrases(["x ที่นี่"])[0].split()[13:] == [
        *("_[ที", "_ที่", "_ี่น", "_่นี", "_นี่", "_ี่]"),
        *("_[ที่", "_ที่น", "_ี่นี", "_่นี่", "_นี่]"),
    ]


def test_zero_width_spaces_end_words_in_runs_and_whole_words_follow():
    text = "x ក\u200bខគ ឃ\u200b\u200dង។ច\u200bx"
    written = rewrite_phrases([text])[0].split()
    assert written[:31] == rewrite_phrases([text.replace("\u200b", " ")])[0].split()[:31]
    assert written[31:] == [
        *("_[ក|", "_ក|ខ", "_|ខគ", "_ខគ]", "_[ក|ខ", "_ក|ខគ", "_|ខគ]", "_[ក]", "_[ខគ]"),
        *("_[ឃ|", "_ឃ|ង", "_|ង]", "_[ឃ|ង", "_ឃ|ង]", "_[ឃ]", "_[ង]"),
        *("_[ច]", "_[ច]"),
    ]


def test_pieces_of_whole_words_and_of_their_ends():
    text = "ក\u200bខគ ឃ"
    pieces = [text[start:stop] for start, stop in WORDS.pieces(text)[17:]]
    assert pieces[:7] == ["ក", "ក\u200bខ", "ខគ", "ខគ", "ក\u200bខ", "ក\u200bខគ", "ខគ"]
    assert pieces[7:] == ["ក", "ខគ", "ឃ", "ឃ"]


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(), st.text(LETTERS)))
def test_texts_without_zero_width_spaces_are_rewritten_as_by_the_version_before(text):
    text = text.replace("\u200b", "")
    for rewriting, before in zip(EARLIER[:2], EARLIER[2:4], strict=True):
        assert rewriting.rewrite(text) == before.rewrite(text)
        assert rewriting.pieces(text) == before.pieces(text)


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(), st.text(LETTERS)))
def test_leading_words_are_added_to_the_version_before(text):
    for rewriting, before in zip((WITH_LETTERS, WORDS), EARLIER, strict=False):
        written = rewriting.rewrite(text).split()
        assert [piece for piece in written if not piece.startswith(("_^", "_:"))] == before.rewrite(text).split()


def test_leading_words_are_those_of_the_text_and_of_its_body():
    def leading(text, mark):
        written = [piece for piece in rewrite_phrases([text])[0].split() if piece.startswith(("_^", "_:"))]
        return " ".join(
            piece.removeprefix(mark) for piece in written if piece.strip("abcdefghijklmnopqrstuvwxyz,") == mark
        )

    text = "small cat, kitten: a young cat (that plays: a lot)"
    assert leading(text, "_^") == "small cat , kitten a young cat"
    assert leading(text, "_:") == "a young cat"  # and a bracket
    assert leading(text, "_::") == "a young"
    untitled = "a young cat that plays"
    assert [leading(untitled, mark) for mark in ("_^", "_:", "_::")] == [untitled, "a young cat that", "a young"]
    assert leading("the end:", "_:") == leading("the end:", "_::") == ""
    assert WORDS.pieces("the end: a")[7:] == [(0, 3), (4, 7), (7, 8), (9, 10), (9, 10), (9, 10)]


def test_letters_of_each_word_come_last():
    assert rewrite_phrases(["a cat 船x"], letters=True)[0].split()[-3:] == ["_[船]", "_<cat", "_cat>"]
    assert rewrite_phrases(["x" * 500], letters=True)[0].count("_") == 63 + 3


@pytest.mark.parametrize("word", ["\u0645\u0644\u0641", "\u0915\u093e\u092e", "\ud30c\uc77c\ub9cc"])
def test_runs_of_letters_are_shorter_in_scripts_whose_words_have_few_characters(word):
    a, b, c = word
    assert rewrite_phrases([word], letters=True)[0].split()[4:] == [
        *(f"_<{a}", f"_{a}{b}", f"_{b}{c}", f"_{c}>"),
        *(f"_<{a}{b}", f"_{word}", f"_{b}{c}>"),
    ]
    assert rewrite_phrases(["\u0444\u0430\u0439\u043b"], letters=True)[0].count("_") == 3 + 3  # Cyrillic


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.text(), st.text(LETTERS)), min_size=1, max_size=3))
@example(["w " * (MAX_WORDS + 9), "\u8239" * (MAX_WORDS + 9)])
def test_phrases_are_written_as_by_the_tokenizer_template(texts):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}, "[UNK]")))
    conversations = [[{"role": "user", "content": text}] for text in texts]
    for rewriting in REWRITINGS.values():
        written = [rewriting.rewrite(text) for text in texts]
        by_template = tokenizer.apply_chat_template(conversations, chat_template=rewriting.template, tokenize=False)
        assert written == by_template
        for text, rewritten in zip(texts, written, strict=True):
            pieces, words = rewriting.pieces(text), rewriting.words(text)
            assert len(pieces) == (len(rewritten.split(" ")) if words else 0)
            assert len(rewriting.spans(text)[:MAX_WORDS]) == len(words)
            assert pieces[: len(words)] == rewriting.spans(text)[:MAX_WORDS]


def test_templates_of_releases_stay_as_they_are():
    """A release is known by its template: if one changes, add the new one and keep this one among the earlier."""
    digests = [hashlib.sha256(template.encode()).hexdigest()[:8] for template in REWRITINGS]
    assert digests[2:] == [
        "6f4dae70",
        "fbf7bd23",
        "2c1a5a6a",
        "362c6276",
        "5c89f68b",
        "abb0d187",
        "dad2232b",
        "4269679c",
    ]


def test_prompt_comes_first_unless_an_earlier_version_ignored_it():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}, "[UNK]")))
    messages = [{"role": "system", "content": "query: "}, {"role": "user", "content": "a boat"}]
    for template, rewriting in REWRITINGS.items():
        read = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert read == "query: " * rewriting.prompted + rewriting.rewrite("a boat")


def test_pieces_of_letters_belong_to_their_word():
    text = "my cats"
    pieces = [text[start:stop] for start, stop in WITH_LETTERS.pieces(text)]
    assert pieces == ["my", "cats", "my cats", *["my", "cats"] * 3, "my", "cats", "cats", "cats"]
    assert WITH_LETTERS.pieces("\u0645\u0644\u0641") == [(0, 3)] * 11  # a word of three Arabic letters


def test_pieces_of_runs_are_the_characters_that_they_touch():
    text = "x ที่นี่"
    pieces = [text[start:stop] for start, stop in WORDS.pieces(text)]
    assert pieces[:5] == ["x", "ที่", "นี่", "x ที่", "ที่นี่"]
    assert pieces[13:19] == ["ที่", "ที่", "ที่นี่", "ที่นี่", "นี่", "นี่"]
    assert pieces[19:] == ["ที่", "ที่นี่", "ที่นี่", "ที่นี่", "นี่"]


def test_letters_are_needed_if_many_words_occur_once():
    assert unseen_share({"a": 2, "b": 1, "c": 1}) == 0.5
    assert not needs_letters(["a red boat"] * 2)
    assert needs_letters(["a red boat", "A red car"])
    assert not needs_letters(["使用船"] * 2)
    assert not needs_letters([])
