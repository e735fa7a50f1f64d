"""New labels of a model: by probability, in reserved places, and through every way to change a model."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_xmc import FaissIndex, LabelIndex, XMCData, XMCModel, static_encoder, train
from hf_xmc.cli import main
from hf_xmc.experiment.measure import complete
from hf_xmc.experiment.settings import ExperimentSettings
from hf_xmc.model.new_labels import new_label_ids

SEEN = [f"seen{i} topic{i % 7}" for i in range(40)]
NEW = [f"fresh{i} topic{i % 7}" for i in range(6)]
UIDS = [f"S{i}" for i in range(40)]


def queries(start, stop):
    rows = [i for i in range(40) for _ in range(start, stop)]
    return Dataset.from_dict(
        {"text": [f"about {SEEN[i]} word{k % 9}" for k, i in enumerate(rows)], "label_ids": [[i] for i in rows]}
    )


def build(index=LabelIndex, memory=True, several=False):
    """A model whose seen labels have long vectors, so that no new label scores as high."""
    encoder = static_encoder([*SEEN, *NEW, "about", *[f"word{k}" for k in range(9)]], embedding_dim=64, device="cpu")
    labels = Dataset.from_dict({"uid": UIDS, "text": SEEN, "seen": [True] * 40})
    texts = torch.from_numpy(encoder.encode_document(SEEN))
    model = XMCModel(encoder, labels, label_vectors=5 * texts)
    model.index = index(model.index.embeddings)
    if memory:
        model.remember(queries(0, 2))
    model.calibrate(queries(2, 4))
    uids = [f"N{i}" for i in range(6)]
    rows = [*zip(uids, NEW, strict=True), *([("N0", "kayak"), ("N5", "dinghy")] if several else [])]
    model.add_labels(Dataset.from_dict({"uid": [uid for uid, _ in rows], "text": [text for _, text in rows]}))
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def uids_of(labels):
    return [label.uid for label in labels]


TEXT = f"about {NEW[3]} {SEEN[10]}"  # both are right


@pytest.mark.parametrize(
    "index", [LabelIndex, lambda embeddings: FaissIndex(embeddings, "HNSW8")], ids=["exact", "faiss"]
)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_new_labels_are_found_that_their_scores_hide(index, memory, several):
    model = build(index, memory, several)
    plain = model.labels[model.search([TEXT], 5).label_ids[0].tolist()]["uid"]
    assert "N3" not in plain
    found = model.predict(TEXT, 5)
    assert uids_of(found)[:2] in (["S10", "N3"], ["N3", "S10"])
    assert all(0 <= label.score <= 1 for label in found)


def test_seen_labels_keep_their_order_and_probabilities(model):
    without = build()
    without.remove_labels([f"N{i}" for i in range(6)])
    before, after = without.predict(TEXT, 10), model.predict(TEXT, 10)
    seen = [label for label in after if label.uid.startswith("S")]
    assert uids_of(seen) == uids_of(before)[: len(seen)]
    np.testing.assert_allclose([one.score for one in seen], [one.score for one in before[: len(seen)]], rtol=1e-5)


def test_places_are_reserved_at_the_end(model):
    text = f"about {SEEN[10]}"
    by_probability = uids_of(model.predict(text, 5, new=0))
    reserved = uids_of(model.predict(text, 5, new=2))
    assert [uid[0] for uid in by_probability[-2:]] != ["N", "N"]
    assert [uid[0] for uid in reserved[-2:]] == ["N", "N"]
    assert reserved[:3] == by_probability[:3]
    assert [uid[0] for uid in uids_of(model.predict(text, 2, new=2))] == ["N", "N"]


def test_allow_and_deny(model):
    assert uids_of(model.predict(TEXT, 5, allow=["N3", "S1"])) == ["N3", "S1"]
    assert uids_of(model.predict(TEXT, 5, allow=["N3"])) == ["N3"]
    assert "N3" not in uids_of(model.predict(TEXT, 10, deny=["N3"], new=4))


def test_threshold_takes_new_labels_by_their_probability(model):
    found = model.predict(TEXT, threshold=0.5)
    assert {"N3", "S10"} <= set(uids_of(found))
    assert all(label.score >= 0.5 for label in found)
    scores = [label.score for label in model.predict(TEXT, 10, threshold=0.0)]
    assert scores == sorted(scores, reverse=True)


def test_search_returns_what_predict_shows(model):
    found = model.search([TEXT], 10, probabilities=True)
    shown = model.predict(TEXT, 10)
    assert model.labels[found.label_ids[0].tolist()]["uid"] == uids_of(shown)
    assert found.scores[0].tolist() == [label.score for label in shown]
    label = model.label_texts.rows_of(["N3"])[0]
    hidden = model.search([TEXT], 10, probabilities=True, exclude=np.array([[0, label]]))
    assert label not in hidden.label_ids


def with_parents(parents, several=False):
    model = build()
    rows = [("P0", "glider"), ("P1", "dinghy"), *([("P0", "sailplane")] if several else [])]
    labels = Dataset.from_dict({"uid": [uid for uid, _ in rows], "text": [text for _, text in rows]})
    model.add_labels(labels, parents=parents)
    return model


PARENTS = [["S10", "quasar"], []]  # a label of the model, and a text


@pytest.mark.parametrize("several", [True, False])
def test_words_of_parents_find_a_new_label(several, tmp_path):
    model, text = with_parents(PARENTS, several), "about quasar"
    assert uids_of(model.predict(text, 1, new=1)) == ["P0"]
    assert model.explain(text, "P0").raw_score > 0.4
    assert with_parents(None, several).explain(text, "P0").raw_score == pytest.approx(0, abs=1e-6)
    above = model.labels["parent_texts"][:]
    assert above == [*[None] * 46, f"{SEEN[10]}\nquasar", None]
    model.save_pretrained(tmp_path / "model")
    loaded = XMCModel.from_pretrained(tmp_path / "model")
    assert loaded.predict(text, 5, new=1) == model.predict(text, 5, new=1)
    assert loaded.label_texts.texts["parent_texts"][:] == model.label_texts.texts["parent_texts"][:]


def test_parents_stay_with_a_label_when_others_change():
    model = with_parents(PARENTS)
    model.remove_labels(["S0"])
    model.rename_label("P0", "zeppelin")
    names = dict(zip(model.labels["uid"], model.labels["text"], strict=True))
    model.update_labels({**names, "P2": "kayak"})
    assert model.labels["parent_texts"][-3:] == [f"{SEEN[10]}\nquasar", None, None]
    assert uids_of(model.predict("about quasar", 1, new=1)) == ["P0"]


def test_parents_may_be_new_labels_too():
    model = build()
    labels = Dataset.from_dict({"uid": ["P0", "P1"], "text": ["glider", "aircraft"]})
    model.add_labels(labels, parents=[["P1"], []])
    assert model.labels["parent_texts"][-2:] == ["aircraft", None]


@pytest.mark.parametrize(
    ("parents", "error"),
    [
        ([["boat"]], "`parents` must have a list for each of the 2 new labels, got 1"),
        (["boat", "car"], "a list of uids or texts as the parents of new label 0, got the single text 'boat'"),
        ([["boat"], [None]], "the parents of new label 1 must be uids or texts, got None"),
        ({"P0": ["boat"]}, "`parents` to be a list with the parents of each label, got a dict"),
    ],
)
def test_parents_of_another_form_are_refused_and_the_model_stays(model, parents, error):
    with pytest.raises(ValueError, match=error):
        model.add_labels(["glider", "dinghy"], parents=parents)
    assert len(model.labels) == 46


def with_new_positives():
    """Write test queries with new labels of :func:`build`, which are the labels after its 40 seen ones."""
    shown = [f"about {text} word1" for text in NEW for _ in range(2)]
    table = [*zip(UIDS, SEEN, strict=True), *((f"N{i}", text) for i, text in enumerate(NEW))]
    labels = Dataset.from_dict({"uid": [uid for uid, _ in table], "text": [text for _, text in table]})
    test = Dataset.from_dict({"text": shown, "label_ids": [[40 + i // 2] for i in range(12)]})
    return XMCData(labels=labels, train=queries(0, 2), validation=queries(2, 4), test=test)


def test_evaluate_ranks_as_predict_does(tmp_path, capsys):
    build().save_pretrained(tmp_path / "model")
    data = with_new_positives()
    rows = [f'"{text}",{data.labels["uid"][one]}' for text, (one,) in zip(*data.test[:].values(), strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,labels", *rows]) + "\n")
    main(["evaluate", str(tmp_path / "model"), str(tmp_path / "rows.csv"), "--text", "text", "--labels", "labels"])
    metrics = json.loads(capsys.readouterr().out)
    found = build().predict(data.test["text"][:], 10)
    right = [uid in uids_of(labels) for uid, labels in zip([f"N{i // 2}" for i in range(12)], found, strict=True)]
    assert metrics["R@10"] == pytest.approx(np.mean(right), abs=1e-6)
    assert metrics["P@1"] > 0.5
    assert 0 <= metrics["ECE@5"] <= 1


@pytest.mark.parametrize("memory", [True, False])
def test_metrics_of_a_training_rank_as_predict_does(memory, tmp_path):
    data, model = with_new_positives(), build(memory=False)
    metrics = complete(model, data, data, ExperimentSettings(data="data", memory=memory))
    found = model.predict(data.test["text"][:], 1)
    right = np.mean([label.uid == f"N{row // 2}" for row, (label,) in enumerate(found)])
    assert right > 0.5
    assert metrics["memory" if memory else "labels"]["P@1"] == pytest.approx(right)
    wanted = metrics["calibration"]["thresholds"][0]
    above = [label for labels in model.predict(data.test["text"][:], threshold=wanted["threshold"]) for label in labels]
    assert wanted["labels_per_text"] == pytest.approx(len(above) / 12)


def test_metrics_of_labels_are_those_of_the_model_without_its_memory(tmp_path):
    data, model = with_new_positives(), build(memory=False)
    model.calibration = None  # as it is after training
    metrics = complete(model, data, data, ExperimentSettings(data="data"))
    model.save_pretrained(tmp_path / "model")
    loaded = XMCModel.from_pretrained(tmp_path / "model", parts=["label_index"])
    for k in (1, 5):
        found = [labels[:k] for labels in loaded.predict(data.test["text"][:], 10)]
        right = [f"N{row // 2}" in uids_of(labels) for row, labels in enumerate(found)]
        assert metrics["labels"][f"P@{k}"] == pytest.approx(np.mean(right) / k)
    assert metrics["labels"]["P@1"] == 0  # by scores, new labels come after seen ones
    assert metrics["memory"]["P@1"] > 0.5


@pytest.mark.parametrize("several", [True, False])
def test_saved_model_knows_its_new_labels(several, tmp_path):
    model = build(several=several)
    model.save_pretrained(tmp_path / "model")
    loaded = XMCModel.from_pretrained(tmp_path / "model")
    assert loaded.predict([TEXT, "kayak"], 10) == model.predict([TEXT, "kayak"], 10)
    loaded.add_labels(["a zeppelin"])
    assert uids_of(loaded.predict("about zeppelin", 5, new=1))[-1:] != ["46"]  # the encoder does not know the word


def test_labels_added_to_a_loaded_model_compete(tmp_path):
    model = build()
    model.remove_labels(["N3"])
    model.save_pretrained(tmp_path / "model")
    loaded = XMCModel.from_pretrained(tmp_path / "model")
    assert "fresh3 topic3" not in [label.text for label in loaded.predict(TEXT, 5)]
    loaded.add_labels(["fresh3 topic3"])
    assert "fresh3 topic3" in [label.text for label in loaded.predict(TEXT, 2)]


def test_only_labels_that_share_votes_end_what_calibration_means(caplog):
    model = build()
    warning = "The labels are not those of the calibration"
    model.predict(TEXT)
    assert warning not in caplog.text  # new labels have probabilities of their own, and no share in those of others
    model.add_labels(Dataset.from_dict({"uid": ["T0"], "text": ["topic9"], "seen": [True]}))
    model.predict(TEXT)
    assert caplog.text.count(warning) == 1
    model.remove_labels(["S0"])
    model.predict(TEXT)
    assert caplog.text.count(warning) == 2
    model.rename_label("S1", "glider")
    model.predict(TEXT)
    assert caplog.text.count(warning) == 3


def test_model_without_this_part_still_loads(tmp_path):
    build().save_pretrained(tmp_path / "model")
    parts = ["label_index", "training_memory", "calibration"]
    loaded = XMCModel.from_pretrained(tmp_path / "model", parts=parts)
    assert "N3" not in uids_of(loaded.predict(TEXT, 5))  # by their scores
    with pytest.raises(ValueError, match="`new` needs to know how probable new labels are"):
        loaded.predict(TEXT, 5, new=1)


def test_changes_of_labels_are_followed():
    model = build()
    model.rename_label("N3", "glider")
    assert "N3" not in uids_of(model.predict(TEXT, 2))
    model.rename_label("N3", NEW[3])
    assert "N3" in uids_of(model.predict(TEXT, 2))
    model.update_labels({**dict(zip(UIDS, SEEN, strict=True)), "N9": NEW[3]})
    assert "N9" in uids_of(model.predict(TEXT, 2))
    model.remove_labels(["S0", "N9"])
    assert uids_of(model.predict(TEXT, 1, new=1)) == ["S10"]  # none is left to reserve a place for


def test_a_label_is_new_until_the_memory_has_a_query_with_it():
    model = build()
    new = model.label_texts.rows_of(["N3"])[0]
    assert new in new_label_ids(model.label_texts, model.memory)
    model.remember(Dataset.from_dict({"text": [TEXT], "label_ids": [[int(new)]]}))
    assert new not in new_label_ids(model.label_texts, model.memory)
    assert len(new_label_ids(model.label_texts, None)) == 6


def test_labels_of_unknown_origin_are_not_new():
    model = XMCModel(static_encoder(SEEN, embedding_dim=8, device="cpu"), SEEN)
    assert not len(new_label_ids(model.label_texts, None))


@pytest.mark.parametrize("new", [-1, 6, 1.5, True, "2"])
def test_impossible_numbers_are_refused(model, new):
    with pytest.raises(ValueError, match="`new` must be a whole number from 0 to the 5 labels of a text"):
        model.predict(TEXT, 5, new=new)


def test_new_is_refused_where_it_has_no_effect(model):
    with pytest.raises(ValueError, match="`new` must be None with a threshold"):
        model.predict(TEXT, new=1, threshold=0.5)
    with pytest.raises(ValueError, match="`new` must be None with a threshold"):
        model.predict(TEXT, new=1, rerank=lambda text, some: [0.0] * len(some))
    plain = XMCModel(model.encoder, SEEN)
    with pytest.raises(ValueError, match="not calibrated yet: call `calibrate`"):
        plain.predict(TEXT, new=1)


def test_text_of_unknown_words_has_no_label(model):
    assert model.predict(["zeppelin", "  "], 5, new=2) == [[], []]


def test_long_texts_find_new_labels_too(model):
    model.long_text = "max"
    assert "N3" in uids_of(model.predict(TEXT, 2))
    model.long_text = "truncate"


def test_threshold_for_counts_new_labels(model):
    label = int(model.label_texts.rows_of(["N3"])[0])
    validation = Dataset.from_dict({"text": [TEXT] * 3, "label_ids": [[label]] * 3})
    threshold = model.threshold_for(validation, labels_per_text=1)
    assert uids_of(model.predict(TEXT, threshold=threshold)) == uids_of(model.predict(TEXT, 1))
    assert "N3" in uids_of(model.predict(TEXT, threshold=model.threshold_for(validation)))


def test_explanation_of_a_new_label_has_the_score_of_its_prediction(model):
    by_uid = {label.uid: label.score for label in model.predict(TEXT, 5)}
    explanation = model.explain(TEXT, "N3")
    assert explanation.new
    assert explanation.score == pytest.approx(by_uid["N3"])
    assert "new label: cosine and shared words score" in str(explanation)
    assert not model.explain(TEXT, "S10").new


def test_a_trained_model_finds_new_labels_that_its_scores_miss(tmp_path):
    words = [f"w{number}" for number in range(60)]
    names = [f"{words[i % 60]} {words[(7 * i + 3 + i // 60) % 60]}" for i in range(90)]
    texts = [f"{names[i]} x{k}" for i in range(80) for k in range(8)]
    data = XMCData.from_lists(texts, [[names[i]] for i in range(80) for _ in range(8)], vocabulary=names[:80])
    flags = {"embedding_dim": 32, "num_train_epochs": 20, "validation_size": 0.2, "use_cpu": True, "report_to": "none"}
    model = train(data, "static", output_dir=tmp_path / "run", **flags)
    model.add_labels(names[80:])
    new = np.arange(80, 90)
    asked = [f"{name} x1" for name in names[80:]]
    plain, found = (model.search(asked, 1, probabilities=shown).label_ids for shown in (False, True))
    assert (found == new[:, None]).sum() > (plain == new[:, None]).sum()
