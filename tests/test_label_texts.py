"""Labels that come, go and change their texts: what is predicted is what a model made of those labels predicts."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import LABELS
from datasets import Dataset

from hf_xmc import FaissIndex, LabelIndex, MemorySettings, XMCModel
from hf_xmc.data.labels import LabelTexts

TEXTS = ["a red boat", "old oak tree", "dog and cat"]
NEW = Dataset.from_dict({"label_id": ["horse", "cart"], "text": ["a red dog", "old car"]})


def table(ids, texts):
    return Dataset.from_dict({"label_id": list(ids), "text": list(texts)})


def named(texts=LABELS):
    return table([f"L{row}" for row in range(len(texts))], texts)


@pytest.fixture(params=[LabelIndex, lambda embeddings: FaissIndex(embeddings, "HNSW8")], ids=["exact", "faiss"])
def model(request, encoder, queries):
    model = XMCModel(encoder, named())
    model.index = request.param(model.index.embeddings)
    model.remember(queries)
    model.memory.settings = MemorySettings(neighbors=4, mix=0.5)
    return model


def same(model, other, texts=TEXTS, k=20):
    for ours, theirs in zip(model.predict(texts, k), other.predict(texts, k), strict=True):
        assert [(p.label_id, p.text) for p in ours] == [(p.label_id, p.text) for p in theirs]
        assert [p.score for p in ours] == pytest.approx([p.score for p in theirs], rel=1e-4, abs=1e-4)


def made_of(encoder, labels, queries, positives):
    """The model of these labels that remembers these queries."""
    model = XMCModel(encoder, labels)
    model.remember(Dataset.from_dict({"text": queries["text"], "label_ids": positives}))
    model.memory.settings = MemorySettings(neighbors=4, mix=0.5)
    return model


def test_added_labels_are_as_if_they_had_always_been_there(model, encoder, queries):
    model.add_labels(NEW)
    ids, texts = [*named()["label_id"], *NEW["label_id"]], [*LABELS, *NEW["text"]]
    same(model, made_of(encoder, table(ids, texts), queries, queries["label_ids"]))
    assert "horse" in [p.label_id for p in model.predict("a red dog", 20)]
    model.remember(Dataset.from_dict({"text": ["car car car"], "label_ids": [[12]]}))
    assert model.memory.num_labels == 13


def test_added_labels_may_have_one_length(encoder):
    model = XMCModel(encoder, LABELS)
    model.add_labels(NEW, length=3)
    for row, text in enumerate(NEW["text"], start=11):
        own = torch.tensor(encoder.encode(text))
        torch.testing.assert_close(model.index.embeddings[row], 3 * own / own.norm())
    with pytest.raises(ValueError, match="length must be positive, got 0"):
        model.add_labels(["horse"], length=0)


def test_removed_labels_are_gone_and_the_others_keep_their_votes(model, encoder, queries):
    model.remove_labels(["L3", "L0"])
    kept = [row for row in range(11) if row not in (0, 3)]
    positives = [[kept.index(label) for label in ids if label in kept] for ids in queries["label_ids"]]
    same(model, made_of(encoder, named().select(kept), queries, positives))
    assert list(model.labels["label_id"]) == [f"L{row}" for row in kept]


def test_a_renamed_label_keeps_its_id_row_and_votes(model, encoder, queries):
    model.rename_label("L4", "old red car")
    texts = [*LABELS[:4], "old red car", *LABELS[5:]]
    same(model, made_of(encoder, named(texts), queries, queries["label_ids"]))
    assert model.labels["text"][4] == "old red car"
    assert model.memory.relevance[:, [4]].sum() == sum(4 in ids for ids in queries["label_ids"])


def test_changes_survive_saving(model, tmp_path):
    model.add_labels(NEW)
    model.remove_labels(["L2", "horse"])
    model.rename_label("L0", "sloop")
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.labels[:] == model.labels[:]
    assert torch.equal(again.index.embeddings, model.index.embeddings)
    same(again, model)


@pytest.mark.parametrize("fails", ["encode_document", "add", "remove", "replace"])
def test_a_change_that_fails_changes_nothing(model, monkeypatch, fails):
    before, labels = model.predict(TEXTS, 20), model.labels[:]
    memory = model.memory.relevance.toarray()

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.encoder if fails == "encode_document" else model.index, fails, broken)
    changes = {
        "add": lambda: model.add_labels(NEW),
        "remove": lambda: model.remove_labels(["L1"]),
        "replace": lambda: model.rename_label("L1", "sloop"),
    }
    tried = ["add", "replace"] if fails == "encode_document" else [fails]
    for name in tried:
        with pytest.raises(RuntimeError, match="out of memory"):
            changes[name]()
    assert (model.predict(TEXTS, 20), model.labels[:]) == (before, labels)
    np.testing.assert_array_equal(model.memory.relevance.toarray(), memory)
    assert model.index.num_labels == 11


def test_several_texts_are_one_label_that_shows_the_first(encoder, queries, tmp_path):
    ids = ["boat", "car", "boat", "pet", "pet", "car"]
    texts = ["boat", "car", "sailing boat", "dog", "cat", "old red car"]
    model = XMCModel(encoder, table(ids, texts))
    assert list(model.labels["label_id"]) == ["boat", "car", "pet"]
    assert list(model.labels["text"]) == ["boat", "car", "dog"]
    by_text = (encoder.encode(TEXTS) @ encoder.encode(texts).T).T
    by_label = {name: np.max([by_text[row] for row in range(6) if ids[row] == name], axis=0) for name in set(ids)}
    for place, found in enumerate(model.predict(TEXTS, 5)):
        assert [p.label_id for p in found] == sorted(by_label, key=lambda name: -by_label[name][place])
        assert [p.score for p in found] == pytest.approx([by_label[p.label_id][place] for p in found], rel=1e-5)
    given = XMCModel(encoder, table(ids, texts), torch.tensor(encoder.encode(texts)))
    same(given, model)
    model.remember(Dataset.from_dict({"text": ["a red animal", "a blue plant"], "label_ids": [[2], [0, 1]]}))
    model.memory.settings = MemorySettings(neighbors=1, mix=0.9)
    assert model.predict("a red animal", 1)[0].text == "dog"
    model.add_labels(table(["tree", "tree"], ["plant", "old oak tree"]))
    model.remove_labels(["car"])
    model.rename_label("pet", "kitten")
    model.memory.settings = MemorySettings(mix=0)
    assert model.predict("old oak tree", 1)[0].text == "plant"
    assert list(model.table.texts["text"]) == ["boat", "sailing boat", "kitten", "cat", "plant", "old oak tree"]
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert list(again.labels["text"]) == ["boat", "kitten", "plant"]
    same(again, model)


def test_labels_say_whether_the_training_saw_them(encoder, tmp_path):
    model = XMCModel(encoder, named().add_column("seen", [row != 2 for row in range(11)]))
    model.add_labels(["horse"])
    model.rename_label("L1", "sloop")
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.labels["seen"] == [True, True, False, *[True] * 8, False]
    unknown = XMCModel(encoder, LABELS)
    assert "seen" not in unknown.labels.column_names
    unknown.add_labels(["horse"])
    assert unknown.labels["seen"] == [*[None] * 11, False]


def test_texts_without_ids_get_numbers_that_are_free(encoder):
    model = XMCModel(encoder, LABELS)
    model.remove_labels(["3", "5"])
    model.add_labels(["horse", "cart"])
    assert list(model.labels["label_id"]) == ["0", "1", "2", "4", "6", "7", "8", "9", "10", "11", "12"]


def test_labels_to_choose_from_are_named_by_their_ids(model):
    everything = [p.label_id for p in model.predict(TEXTS[0], 20)]
    allowed = model.predict(TEXTS[0], 20, allow=["L7", "L2"])
    assert sorted(p.label_id for p in allowed) == ["L2", "L7"]
    left = model.predict(TEXTS[:1], 3, deny=everything[:4])[0]
    assert not {p.label_id for p in left} & set(everything[:4])
    assert [p.label_id for p in model.predict(TEXTS[0], 3, allow=["L7", "L2"], deny=["L7"])] == ["L2"]
    assert model.predict(TEXTS[:1], 3, allow=[]) == [[]]


def test_labels_left_out_when_a_model_is_loaded_take_no_memory(model, encoder, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.remove_labels(["L3", "L0"])
    again = XMCModel.from_pretrained(tmp_path / "model", deny=["L0", "L3"], device="cpu")
    same(again, model)
    assert again.index.embeddings.untyped_storage().nbytes() == 9 * 16 * 4
    assert again.memory.relevance.shape == (13, 9)
    few = XMCModel.from_pretrained(tmp_path / "model", labels=named(), allow=["L7", "L2"], deny=["L2"], device="cpu")
    assert list(few.labels["label_id"]) == ["L7"]
    encoder.save_pretrained(str(tmp_path / "plain"))
    plain = XMCModel.from_pretrained(tmp_path / "plain", labels=named(), allow=["L7"], device="cpu")
    assert list(plain.labels["label_id"]) == ["L7"]
    with pytest.raises(ValueError, match="label_id 'L99' is none of the 11 labels"):
        XMCModel.from_pretrained(tmp_path / "model", deny=["L99"])


def test_texts_without_ids_in_a_data_set_get_free_numbers_too(encoder):
    model = XMCModel(encoder, LABELS)
    model.add_labels(Dataset.from_dict({"text": ["horse"]}))
    assert model.labels["label_id"][11] == "11"


@pytest.mark.parametrize("seen", [[1, 0], [True, False], ["true", "false"]])
def test_labels_of_other_column_types_are_saved_and_added_to(seen, encoder, tmp_path):
    columns = {
        "label_id": pa.array(["b", "c"], pa.large_string()),
        "text": pa.array(["boat", "car"], pa.large_string()),
        "seen": pa.array(seen),
    }
    labels = Dataset(pa.table(columns))
    model = XMCModel(encoder, labels)
    model.add_labels(["dog"])
    model.rename_label("c", "old car")
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.labels[:] == {
        "label_id": ["b", "c", "2"],
        "text": ["boat", "old car", "dog"],
        "seen": [True, False, False],
    }
    again.add_labels(Dataset(labels.data.table.set_column(0, "label_id", pa.array([7, 8]))))
    assert list(again.labels["label_id"]) == ["b", "c", "2", "7", "8"]


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ("catamaran", "got the one text 'catamaran': put it in a list"),
        ({"boat": 1, "car": 2}, r"got a dict\."),
        (pd.DataFrame({"label_id": ["a"], "text": ["boat"]}), r"as Dataset.from_pandas .* make it, got a DataFrame\."),
        (["boat", 7], "label 1 is a int; expected a string"),
        (Dataset.from_dict({"text": [["boat"]]}), r"text is list<item: string>; expected a string"),
        (Dataset.from_dict({"text": ["boat"], "seen": ["perhaps"]}), "seen of the labels is string; expected bool"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(labels, wrong, encoder, model):
    for take in (lambda labels: XMCModel(encoder, labels), model.add_labels):
        with pytest.raises(ValueError, match=wrong):
            take(labels)


def test_bad_input_says_what_was_got(model):
    with pytest.raises(ValueError, match="label_id 0 is a int; expected a string, as `predict` shows it"):
        model.predict(TEXTS, deny=[0])
    with pytest.raises(ValueError, match="label_id 'L99' is none of the 11 labels"):
        model.predict(TEXTS, allow=["L1", "L99"])
    with pytest.raises(ValueError, match="got the one text 'L1': put it in a list"):
        model.predict(TEXTS, deny="L1")
    with pytest.raises(ValueError, match="label_id 'L4' is there already: `rename_label` gives it another text"):
        model.add_labels(table(["N1", "L4"], ["a", "b"]))
    with pytest.raises(ValueError, match="label_id 'L99' is none"):
        model.remove_labels(["L99"])
    with pytest.raises(ValueError, match="label_id 'L99' is none"):
        model.rename_label("L99", "sloop")
    with pytest.raises(ValueError, match="no label would be left"):
        model.remove_labels(list(model.labels["label_id"]))
    with pytest.raises(ValueError, match="label 1 has no label_id"):
        LabelTexts.of(Dataset.from_dict({"label_id": ["a", None], "text": ["a", "b"]}))
    assert len(model.labels) == 11
