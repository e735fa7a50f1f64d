"""Labels that come, go and change their texts: what is predicted is what a model made of those labels predicts."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS

from hf_xmc import FaissIndex, LabelIndex, MemorySettings, XMCModel
from hf_xmc.data.labels import LabelTexts

TEXTS = ["a red boat", "old oak tree", "dog and cat"]
NEW = Dataset.from_dict({"uid": ["horse", "cart"], "text": ["a red dog", "old car"]})


def table(ids, texts):
    return Dataset.from_dict({"uid": list(ids), "text": list(texts)})


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
        assert [(p.uid, p.text) for p in ours] == [(p.uid, p.text) for p in theirs]
        assert [p.score for p in ours] == pytest.approx([p.score for p in theirs], rel=1e-4, abs=1e-4)


def made_of(encoder, labels, queries, positives):
    """The model of these labels that remembers these queries."""
    model = XMCModel(encoder, labels)
    model.remember(Dataset.from_dict({"text": queries["text"], "label_ids": positives}))
    model.memory.settings = MemorySettings(neighbors=4, mix=0.5)
    return model


def test_add_labels_gives_the_model_made_with_all_labels(model, encoder, queries):
    model.add_labels(NEW)
    ids, texts = [*named()["uid"], *NEW["uid"]], [*LABELS, *NEW["text"]]
    same(model, made_of(encoder, table(ids, texts), queries, queries["label_ids"]))
    assert "horse" in [p.uid for p in model.predict("a red dog", 20)]
    model.remember(Dataset.from_dict({"text": ["car car car"], "label_ids": [[12]]}))
    assert model.memory.num_labels == 13


def test_add_labels_scales_embeddings_to_norm(encoder):
    model = XMCModel(encoder, LABELS)
    model.add_labels(NEW, norm=3)
    for row, text in enumerate(NEW["text"], start=11):
        own = torch.tensor(encoder.encode(text))
        torch.testing.assert_close(model.index.embeddings[row], 3 * own / own.norm())
    with pytest.raises(ValueError, match="`norm` must be positive, got 0"):
        model.add_labels(["horse"], norm=0)


def test_remove_labels_keeps_votes_of_others(model, encoder, queries):
    model.remove_labels(["L3", "L0"])
    kept = [row for row in range(11) if row not in (0, 3)]
    positives = [[kept.index(label) for label in ids if label in kept] for ids in queries["label_ids"]]
    same(model, made_of(encoder, named().select(kept), queries, positives))
    assert list(model.labels["uid"]) == [f"L{row}" for row in kept]


def test_rename_label_keeps_uid_row_and_votes(model, encoder, queries):
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
def test_failed_change_leaves_the_model_unchanged(model, monkeypatch, fails):
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


def test_label_with_several_texts_shows_the_first(encoder, queries, tmp_path):
    ids = ["boat", "car", "boat", "pet", "pet", "car"]
    texts = ["boat", "car", "sailing boat", "dog", "cat", "old red car"]
    model = XMCModel(encoder, table(ids, texts))
    assert list(model.labels["uid"]) == ["boat", "car", "pet"]
    assert list(model.labels["text"]) == ["boat", "car", "dog"]
    by_text = (encoder.encode(TEXTS) @ encoder.encode(texts).T).T
    by_label = {name: np.max([by_text[row] for row in range(6) if ids[row] == name], axis=0) for name in set(ids)}
    for place, found in enumerate(model.predict(TEXTS, 5)):
        assert [p.uid for p in found] == sorted(by_label, key=lambda name: -by_label[name][place])
        assert [p.score for p in found] == pytest.approx([by_label[p.uid][place] for p in found], rel=1e-5)
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
    assert list(model.label_texts.texts["text"]) == ["boat", "sailing boat", "kitten", "cat", "plant", "old oak tree"]
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert list(again.labels["text"]) == ["boat", "kitten", "plant"]
    same(again, model)


def test_labels_tell_whether_training_saw_them(encoder, tmp_path):
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


def test_texts_without_uids_get_free_numbers(encoder):
    model = XMCModel(encoder, LABELS)
    model.remove_labels(["3", "5"])
    model.add_labels(["horse", "cart"])
    assert list(model.labels["uid"]) == ["0", "1", "2", "4", "6", "7", "8", "9", "10", "11", "12"]


def test_allow_and_deny_take_uids(model):
    everything = [p.uid for p in model.predict(TEXTS[0], 20)]
    allowed = model.predict(TEXTS[0], 20, allow=["L7", "L2"])
    assert sorted(p.uid for p in allowed) == ["L2", "L7"]
    left = model.predict(TEXTS[:1], 3, deny=everything[:4])[0]
    assert not {p.uid for p in left} & set(everything[:4])
    assert [p.uid for p in model.predict(TEXTS[0], 3, allow=["L7", "L2"], deny=["L7"])] == ["L2"]
    assert model.predict(TEXTS[:1], 3, allow=[]) == [[]]


def test_labels_left_out_at_loading_take_no_memory(model, encoder, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.remove_labels(["L3", "L0"])
    again = XMCModel.from_pretrained(tmp_path / "model", deny=["L0", "L3"], device="cpu")
    same(again, model)
    assert again.index.embeddings.untyped_storage().nbytes() == 9 * 16 * 4
    assert again.memory.relevance.shape == (13, 9)
    few = XMCModel.from_pretrained(tmp_path / "model", labels=named(), allow=["L7", "L2"], deny=["L2"], device="cpu")
    assert list(few.labels["uid"]) == ["L7"]
    encoder.save_pretrained(str(tmp_path / "plain"))
    plain = XMCModel.from_pretrained(tmp_path / "plain", labels=named(), allow=["L7"], device="cpu")
    assert list(plain.labels["uid"]) == ["L7"]
    with pytest.raises(ValueError, match="uid 'L99' is not one of the 11 labels"):
        XMCModel.from_pretrained(tmp_path / "model", deny=["L99"])


def test_data_set_without_uids_gets_free_numbers(encoder):
    model = XMCModel(encoder, LABELS)
    model.add_labels(Dataset.from_dict({"text": ["horse"]}))
    assert model.labels["uid"][11] == "11"


@pytest.mark.parametrize("seen", [[1, 0], [True, False], ["true", "false"]])
def test_labels_of_other_column_types_are_saved_and_added_to(seen, encoder, tmp_path):
    columns = {
        "uid": pa.array(["b", "c"], pa.large_string()),
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
        "uid": ["b", "c", "2"],
        "text": ["boat", "old car", "dog"],
        "seen": [True, False, False],
    }
    again.add_labels(Dataset(labels.data.table.set_column(0, "uid", pa.array([7, 8]))))
    assert list(again.labels["uid"]) == ["b", "c", "2", "7", "8"]


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ("catamaran", "got the single text 'catamaran'. Put it in a list"),
        ({"boat": 1, "car": 2}, r"got a dict\."),
        (pd.DataFrame({"uid": ["a"], "text": ["boat"]}), r"such as from Dataset.from_pandas .*, got a DataFrame\."),
        (["boat", 7], "label 1 must be a string, got a int"),
        (Dataset.from_dict({"text": [["boat"]]}), r"text must be a string, got list<item: string>"),
        (
            Dataset.from_dict({"text": ["boat"], "seen": ["perhaps"]}),
            "seen of the labels must be bool, got string",
        ),
    ],
)
def test_invalid_labels_are_refused(labels, wrong, encoder, model):
    for take in (lambda labels: XMCModel(encoder, labels), model.add_labels):
        with pytest.raises(ValueError, match=wrong):
            take(labels)


def test_bad_input_says_what_was_got(model):
    with pytest.raises(ValueError, match="a uid must be a string, as `predict` shows it, got 0, a int"):
        model.predict(TEXTS, deny=[0])
    with pytest.raises(ValueError, match="uid 'L99' is not one of the 11 labels"):
        model.predict(TEXTS, allow=["L1", "L99"])
    with pytest.raises(ValueError, match="got the single text 'L1'"):
        model.predict(TEXTS, deny="L1")
    with pytest.raises(ValueError, match=r"uid 'L4' already exists\. Give it another text with `rename_label`"):
        model.add_labels(table(["N1", "L4"], ["a", "b"]))
    with pytest.raises(ValueError, match="uid 'L99' is not one of"):
        model.remove_labels(["L99"])
    with pytest.raises(ValueError, match="uid 'L99' is not one of"):
        model.rename_label("L99", "sloop")
    with pytest.raises(ValueError, match="no label would be left"):
        model.remove_labels(list(model.labels["uid"]))
    with pytest.raises(ValueError, match="label 1 has no uid"):
        LabelTexts.of(Dataset.from_dict({"uid": ["a", None], "text": ["a", "b"]}))
    assert len(model.labels) == 11


def test_label_tables_are_not_hashed_or_numbered_twice_and_memory_goes_back(encoder, monkeypatch, tmp_path):
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "model")
    numbered, given_back = [], []

    class Pool:
        def release_unused(self):
            given_back.append(len(numbered))

    def hashes(*_):
        raise AssertionError("datasets hashes the whole table")

    def codes(rows):
        numbered.append(len(rows))
        return np.arange(len(rows))

    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", hashes)
    monkeypatch.setattr("hf_xmc.data.labels._codes", codes)
    monkeypatch.setattr("pyarrow.default_memory_pool", Pool)
    loaded = XMCModel.from_pretrained(tmp_path / "model", verify=False)
    assert loaded.label_texts.texts["text"][:] == LABELS
    assert loaded.label_texts.labels["uid"][:] == [str(row) for row in range(len(LABELS))]
    np.testing.assert_array_equal(loaded.label_texts.label_of, np.arange(len(LABELS)))
    assert numbered == [len(LABELS)]
    assert given_back == [1]  # after the numbering


def test_texts_of_a_label_that_are_apart_are_brought_together():
    rows = table(["b", "a", "b", "c", "a"], ["b1", "a1", "b2", "c1", "a2"])
    together, order = LabelTexts.of(rows)
    np.testing.assert_array_equal(order, [0, 2, 1, 4, 3])
    np.testing.assert_array_equal(together.label_of, [0, 0, 1, 1, 2])
    assert together.texts["text"][:] == ["b1", "b2", "a1", "a2", "c1"]
    assert together.labels["text"][:] == ["b1", "a1", "c1"]
    np.testing.assert_array_equal(together.text_counts, [2, 2, 1])
    adjacent, order = LabelTexts.of(together.texts)
    np.testing.assert_array_equal(order, np.arange(5))
    np.testing.assert_array_equal(adjacent.label_of, together.label_of)
