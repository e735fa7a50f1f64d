"""An explanation adds up to what is predicted."""

import numpy as np
import pytest
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES

from hf_xmc import MemorySettings, XMCModel

TEXT = "an old red boat"


@pytest.fixture
def model(encoder, queries):
    seen = Dataset.from_dict({"uid": [f"L{row}" for row in range(11)], "text": LABELS, "seen": [True] * 11})
    model = XMCModel(encoder, seen)
    model.remember(queries)
    model.memory.settings = MemorySettings(neighbors=4, mix=0.4, discount=0.1)
    return model


def test_explanation_parts_add_up_to_the_predicted_score(model, queries):
    model.calibrate(queries)
    raw = model.search([TEXT], 11)
    raw_score = {f"L{row}": score for row, score in zip(raw.label_ids[0], raw.scores[0], strict=True)}
    for place, label in enumerate(model.predict(TEXT, 11)):
        why = model.explain(TEXT, label.uid)
        assert (why.uid, why.text, why.seen) == (label.uid, label.text, True)
        assert why.score == pytest.approx(label.score, abs=1e-6)
        assert why.raw_score == pytest.approx(raw_score[label.uid], rel=1e-5)
        mixed = (1 - why.mix) * why.weight + why.mix * why.vote
        assert np.log(mixed) - why.penalty == pytest.approx(why.raw_score)
        exponent = 0.1 if place else -0.01  # the first label gets a bonus
        frequency = np.log1p(sum(int(label.uid[1:]) in ids for ids in POSITIVES))
        assert why.penalty == pytest.approx(exponent * frequency)
        assert f"frequency {'takes' if place else 'adds'} {abs(why.penalty):.3f}" in str(why)


def test_the_nearest_queries_carry_the_label_and_their_votes_add_up(model, encoder, queries):
    texts, known = list(queries["text"]), encoder.encode(list(queries["text"]))
    cosine = known @ encoder.encode(TEXT) / np.linalg.norm(known, axis=1) / np.linalg.norm(encoder.encode(TEXT))
    for row in range(11):
        why = model.explain(TEXT, f"L{row}", nearest=20)
        carriers = [number for number, ids in enumerate(POSITIVES) if row in ids]
        assert [known.text for known in why.nearest] == [texts[n] for n in sorted(carriers, key=lambda n: -cosine[n])]
        assert [known.similarity for known in why.nearest] == pytest.approx(sorted(cosine[carriers])[::-1], abs=1e-3)
        assert sum(known.weight for known in why.nearest) == pytest.approx(why.vote, abs=1e-6)
    assert any(model.explain(TEXT, f"L{row}").vote > 0 for row in range(11))


def test_explanation_without_memory_is_the_label_score(model, encoder):
    model.memory = None
    model.add_labels(["kayak"])
    for label in model.predict(TEXT, 12):
        why = model.explain(TEXT, label.uid)
        assert why.score == why.raw_score == why.label_score == pytest.approx(label.score, rel=1e-5)
        assert (why.vote, why.mix, why.nearest) == (None, None, ())
        assert why.seen == (label.text != "kayak")


def test_words_are_weighed_without_a_search(model, monkeypatch):
    expected = model.explain(TEXT, "L3")
    monkeypatch.setattr("hf_xmc.search.exact.LabelIndex.search", None)
    words = model.weigh_words(TEXT, "L3")
    assert words.words == expected.words
    assert words.exact
    assert sum(word.weight for word in words.words) == pytest.approx(expected.label_score, rel=1e-5)
    for text, uid, message in ((" ", "L3", "holds no token"), ("boat", "L99", "L99")):
        with pytest.raises(ValueError, match=message):
            model.weigh_words(text, uid)


def test_explanation_prints_line_by_line(model):
    best = model.predict(TEXT, 1)[0]
    lines = str(model.explain(TEXT, best.uid, nearest=2)).split("\n")
    assert lines[0] == f"{best.score:.3f}  {best.text}  ({best.uid}, seen in training)"
    assert lines[1].startswith("  labels count 60%: ")
    assert lines[2].startswith("  memory counts 40%: ")
    assert lines[5] == "  words (add up to the label score):"
    assert len(lines) == 6 + len(["an", "old", "red", "boat"])
    model.memory = None
    assert "label score" in str(model.explain(TEXT, best.uid))


def test_explanation_scores_a_label_beyond_the_candidates(encoder):
    model = XMCModel(encoder, ["boat", *["dog"] * 200])
    model.remember(Dataset.from_dict({"text": ["boat"], "label_ids": [[0]]}))
    why = model.explain("dog", "0")
    assert (why.weight, why.vote) == (0, 1)
    model.remove_labels(["0"])
    model.add_labels(["boat"])
    last = model.predict("dog", 201)[-1]
    assert last.text == "boat"
    assert model.explain("dog", last.uid).score == pytest.approx(last.score, rel=1e-5)
    model.memory.settings = MemorySettings(mix=1)
    assert model.explain("dog", last.uid).score == -np.inf


def test_bad_input_says_what_was_got(model):
    with pytest.raises(ValueError, match="uid 'L99' is not one of the 11 labels"):
        model.explain(TEXT, "L99")
