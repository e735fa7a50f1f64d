"""Linear classifiers of the labels: their scores, next to those of a static encoder."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from datasets import Dataset
from sklearn.svm import LinearSVC

from hf_xmc import XMCModel, phrase_encoder, rewrite_phrases, standalone_encoder, static_encoder
from hf_xmc.training.classifiers import add_classifiers, fit_classifiers, token_shares

TEXTS = [
    "a red cat",
    "a red dog runs",
    "the dog",
    "the red red cat sleeps here",
    "a bird sings",
    "a bird and a dog",
    "",
]
POSITIVES = [[0], [1, 0], [1], [0], [2], [2, 1], [2]]  # no query has label 3
LABELS = ["cat", "dog", "bird", "fish"]
NEW = ["the red dog", "a cat sings", "a red bird", "zz"]  # z is in no text


def queries(texts=TEXTS):
    return Dataset.from_dict({"text": texts, "label_ids": POSITIVES})


def scores_of(encoder, vectors, texts=NEW, labels=LABELS):
    """Return the scores of the labels in double precision, ``(N, L)``."""
    query, label = (torch.tensor(encoder.encode(some)).double() for some in (texts, labels))
    return (query @ (label + vectors.double()).T).numpy()


def shares_of(texts, tokens):
    words = [text.split() for text in texts]
    return [{word: count / len(one) for word, count in Counter(one).items() if word in tokens} for one in words]


def by_hand(texts):
    """Return the scores of support vector machines on the words of texts, computed with dictionaries and loops."""
    shares = shares_of(TEXTS, {word for text in TEXTS for word in text.split()})
    known = sorted({word for row in shares for word in row})
    rarity = {word: 1 + math.log((1 + len(TEXTS)) / (1 + sum(word in row for row in shares))) for word in known}
    features = np.array([[row.get(word, 0) * rarity[word] for word in known] for row in shares])
    factor = 2 / np.linalg.norm(features, axis=1).mean()
    new = np.array([[row.get(word, 0) * rarity[word] for word in known] for row in shares_of(texts, known)])
    shown = np.array([[sum(row.values())] for row in shares_of(texts, known)])
    columns = []
    for label in range(3):
        machine = LinearSVC(dual=True, random_state=0)
        machine.fit(sp.csr_matrix(factor * features), [label in positives for positives in POSITIVES])
        columns.append(factor * new @ machine.coef_[0] + shown[:, 0] * (1 + machine.intercept_[0]))
    return np.array([*columns, np.zeros(len(texts))]).T


@pytest.fixture
def encoder():
    return static_encoder([*TEXTS, *LABELS], embedding_dim=7)


@pytest.mark.parametrize("given", [False, True])
def test_scores_of_machines_are_added_to_those_of_the_encoder(encoder, given):
    own = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) if given else None
    before = scores_of(encoder, torch.zeros(4, 7) if own is None else own)
    vectors = add_classifiers(encoder, queries(), 4, own)
    assert vectors.shape == (4, 11)
    assert vectors.dtype == torch.float32
    assert encoder.get_embedding_dimension() == 11
    added = scores_of(encoder, vectors) - before
    expected = 10 * by_hand(NEW)
    assert abs(expected[:, :3]).max() > 5
    np.testing.assert_allclose(added, expected, atol=0.02)
    assert added[0].argmax() == 1  # the dog


def test_queries_are_read_with_their_prompt():
    with_prompt, plain = (static_encoder([*TEXTS, *LABELS], embedding_dim=7) for _ in range(2))
    with_prompt.prompts["query"] = "a bird "
    add_classifiers(with_prompt, queries(), 4)
    add_classifiers(plain, queries(["a bird " + text for text in TEXTS]), 4)
    np.testing.assert_array_equal(with_prompt.encode_query(NEW), plain.encode(["a bird " + text for text in NEW]))
    add_classifiers(other := static_encoder([*TEXTS, *LABELS], embedding_dim=7), queries(), 4)
    assert not np.allclose(other.encode(NEW), plain.encode(NEW), rtol=1e-3)


def test_unknown_words_and_labels_without_queries_get_no_score(encoder):
    before = scores_of(encoder, torch.zeros(4, 7))
    vectors = add_classifiers(encoder, queries(), 4)
    after = scores_of(encoder, vectors)
    assert not encoder.encode(["zz"]).any()
    np.testing.assert_allclose(after[:, 3], before[:, 3], atol=2e-3)


def test_cosines_stay_nearly_the_same(encoder):
    def cosines():
        units = torch.nn.functional.normalize(torch.tensor(encoder.encode([*NEW[:3], *TEXTS[:6]])))
        return units @ units.T

    before = cosines()
    add_classifiers(encoder, queries(), 4)
    assert (cosines() - before).abs().max() < 1e-3


def test_plain_texts_and_a_saved_model_score_the_same(tmp_path):
    rewritten = rewrite_phrases(TEXTS)
    encoder = phrase_encoder([*rewritten, *rewrite_phrases(LABELS)], embedding_dim=9, min_count=1)
    vectors = add_classifiers(encoder, queries(rewritten), 4)
    assert not encoder.encode(rewrite_phrases(["zz"])).any()
    expected = scores_of(encoder, vectors, rewrite_phrases(NEW), rewrite_phrases(LABELS))
    model = XMCModel(standalone_encoder(encoder), LABELS, label_vectors=vectors)
    model.save_pretrained(tmp_path / "model")
    for one in (model, XMCModel.from_pretrained(tmp_path / "model")):
        found = one.predict(NEW[:3], 4)
        for row, labels in enumerate(found):
            scores = {label.text: label.score for label in labels}
            np.testing.assert_allclose([scores[name] for name in LABELS], expected[row], atol=1e-4)


def test_a_label_of_all_queries_and_one_of_none_have_constant_scores():
    shares = sp.csr_array(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    relevance = sp.csr_array(np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    weights, biases = fit_classifiers(shares, relevance)
    assert biases[:2].tolist() == [1, -1]
    assert not weights[:, :2].any()
    assert weights[0, 2] > 0


def test_shares_count_each_token_of_a_text(encoder):
    shares = token_shares(encoder[0], ["red red cat", "", "zz cat"])
    ids = encoder[0].tokenizer.get_vocab()
    assert shares.shape == (3, len(ids))
    assert shares.toarray()[0, ids["red"]] == pytest.approx(2 / 3)
    assert shares.sum(1).tolist() == pytest.approx([1, 0, 1])
