"""The weights of words add up to the score for static encoders, and are differences of scores for others."""

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS, make_bert_encoder, several_texts
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_xmc import XMCModel, phrase_encoder, rewrite_phrases, standalone_encoder, static_encoder

TEXT = "An old red boat, an unseen zzz and a car!"
TEXTS = [*LABELS, "text about and an old red boat , a car !", "query: old red boat"] * 2


def static(**settings):
    encoder = static_encoder(TEXTS, embedding_dim=12, device="cpu")
    for name, value in settings.items():
        setattr(encoder, name, value)
    return encoder


def normalised():
    encoder = static()
    encoder.append(Normalize())
    return encoder


def phrases(**settings):
    made = phrase_encoder(rewrite_phrases(TEXTS), embedding_dim=12, device="cpu")
    encoder = standalone_encoder(made)
    encoder[0].auto_model.positions_embed.weight.data.normal_(std=0.1)  # as after further training
    for name, value in settings.items():
        setattr(encoder, name, value)
    return encoder


STATIC = {
    "static": static,
    "cosine": lambda: static(similarity_fn_name="cosine"),
    "normalised": normalised,
    "truncated": lambda: static(truncate_dim=5),
    "prompt": lambda: static(prompts={"query": "old ", "document": ""}),
    "phrases": phrases,
    "phrases, cosine": lambda: phrases(similarity_fn_name="cosine"),
    "phrases, prompt": lambda: phrases(prompts={"query": "query: ", "document": ""}),
    "phrases, truncated": lambda: phrases(truncate_dim=5),
}


@pytest.mark.parametrize("name", STATIC)
def test_weights_of_a_static_encoder_add_up_to_the_score(name):
    model = XMCModel(STATIC[name](), LABELS)
    found = model.search([TEXT], len(LABELS))
    of_red = []
    for label, score in zip(found.label_ids[0].tolist(), found.scores[0].tolist(), strict=True):
        why = model.explain(TEXT, str(label))
        assert why.words_add_up
        assert sum(word.weight for word in why.words) == pytest.approx(score, rel=1e-5, abs=1e-6)
        by_place = {(word.start, word.end): word for word in why.words}
        assert len(by_place) == len(why.words)
        assert all(word.text == TEXT[word.start : word.end] for word in why.words if word.end)
        assert ("prompt" in name) == ((0, 0) in by_place)
        assert by_place[7, 10].text == "red"
        of_red.append(by_place[7, 10].weight)
        assert by_place[27, 30].text == "zzz"
        if "phrases" in name:
            assert by_place[7, 15].text == "red boat"
        else:
            assert by_place[27, 30].weight == 0  # nothing is known of it
    assert all(of_red)
    assert max(map(abs, of_red)) > 1e-3


def lookup(vectors, tokenizer):
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=torch.tensor(vectors))])


def test_weights_are_the_shares_of_the_mean_that_a_hand_computes():
    tokenizer = Tokenizer(models.WordLevel({"red": 0, "boat": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = lookup([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]], tokenizer)
    encoder.similarity_fn_name = "dot"
    model = XMCModel(encoder, ["boat", "red"], torch.tensor([[1.0, 3.0], [1.0, 0.0]]))
    why = model.explain("red boat boat what", "0")
    assert [tuple(word) for word in why.words] == [
        ("red", 0, 3, pytest.approx(2 / 4)),  # 2 * 1 over four tokens
        ("boat", 4, 8, pytest.approx(12 / 4)),
        ("boat", 9, 13, pytest.approx(12 / 4)),
        ("what", 14, 18, 0),
    ]
    assert why.label_score == pytest.approx(26 / 4)


def test_a_token_over_several_words_is_one_entry():
    tokenizer = Tokenizer(models.Unigram([("?", 0.0), ("red boat", -1.0), ("s", -2.0), (" ", -2.0)], unk_id=0))
    model = XMCModel(lookup([[0.0], [6.0], [3.0], [3.0]], tokenizer), ["a"], torch.ones(1, 1))
    model.encoder.similarity_fn_name = "dot"
    why = model.explain("red boats s", "0")
    assert [tuple(word) for word in why.words] == [
        ("red boats", 0, 9, pytest.approx(6 / 4)),
        ("boats", 4, 9, pytest.approx(3 / 4)),  # of its last letter
        (" ", 9, 10, pytest.approx(3 / 4)),
        ("s", 10, 11, pytest.approx(3 / 4)),
    ]


def adds_up(model, why, text):
    """Whether the weights of many words add up, but for the rounding of float32, which grows with both norms."""
    norms = float(model.embed([text]).norm() * model.index.embeddings[int(why.uid)].norm())
    return sum(word.weight for word in why.words) == pytest.approx(why.label_score, abs=1e-5 * norms)


def test_words_that_are_not_read_weigh_nothing_unless_texts_are_read_in_chunks():
    model = XMCModel(phrases(), LABELS)
    text = "boat " * 512 + "car " * 300
    cut = model.explain(text, "2")
    assert adds_up(model, cut, text)
    assert {word.weight for word in cut.words if word.text == "car"} == {0}
    assert len([word for word in cut.words if word.text == "car"]) == 300
    model.long_text = "mean"
    read = model.explain(text, "2")
    assert read.words_add_up
    assert adds_up(model, read, text)
    assert {text[word.start : word.end] for word in read.words} >= {"boat", "car", "car car"}
    assert max(word.end for word in read.words) == len(text) - 1


def test_a_label_with_several_texts_is_explained_by_the_best_of_them(encoder):
    model = XMCModel(encoder, several_texts()[0])
    for prediction in model.predict("a blue boat and an old tree", 4):
        why = model.explain("a blue boat and an old tree", prediction.uid)
        assert sum(word.weight for word in why.words) == pytest.approx(prediction.score, rel=1e-5)


@pytest.mark.parametrize("labels", ["one text", "several texts"])
def test_weights_of_other_encoders_are_the_scores_lost_without_a_word(labels, bert_folder, monkeypatch):
    encoder = make_bert_encoder(bert_folder)
    model = XMCModel(encoder, LABELS if labels == "one text" else several_texts()[0])
    monkeypatch.setattr("hf_xmc.model.word_weights.AT_ONCE", 2)
    why = model.explain("red boat, blue", model.labels["uid"][0])
    assert not why.words_add_up
    assert [word.text for word in why.words] == ["red", "boat", ",", "blue"]

    def score(text):
        found = model.search([text], 1, allow=[0])
        return found.scores[0, 0]

    without = ["boat, blue", "red , blue", "red boat blue", "red boat, "]
    lost = [score("red boat, blue") - score(text) for text in without]
    assert [word.weight for word in why.words] == pytest.approx(lost, abs=1e-5)
    assert "they do not add up" in str(why)
    assert np.abs(lost).max() > 1e-3


def test_a_layer_on_top_of_a_static_embedding_is_not_taken_for_a_mean():
    encoder = static()
    encoder.append(Dense(12, 12))
    why = XMCModel(encoder, LABELS).explain("red boat", "0")
    assert not why.words_add_up
    assert [word.text for word in why.words] == ["red", "boat"]


def test_words_are_shown_largest_first_and_the_others_in_one_sum():
    why = XMCModel(static(), LABELS).explain(TEXT, "0", nearest=0)
    lines = str(why).split("\n")
    assert lines[2] == "  words (add up to the label score):"
    assert len(lines) == 3 + 8 + 1
    shown = [float(line.split()[0]) for line in lines[3:]]
    assert sorted(map(abs, shown[:8]), reverse=True) == list(map(abs, shown[:8]))
    assert sum(shown) == pytest.approx(why.label_score, abs=0.006)
    assert lines[-1].endswith(f"{len(why.words) - 8} more")
