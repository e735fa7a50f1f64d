"""Another version of a vocabulary: the differences, and a model that is as if it had been made with it."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import make_static_encoder

from hf_xmc import FaissIndex, XMCModel

OLD = {"n1": ["boat", "sailing boat"], "n2": ["car"], "n3": ["animal", "dog"], "n4": ["red"]}
NEW = {"n3": ["animal", "cat", "dog"], "n5": ["plant", "old oak tree"], "n1": ["sailing boat"], "n2": ["blue car"]}
QUERIES = ["an old sailing boat", "a red car", "a dog and a cat", "a plant"]
ORDER = ["n1", "n2", "n3", "n5"]


def labels_of(vocabulary):
    pairs = [(uid, text) for uid, texts in vocabulary.items() for text in texts]
    return Dataset.from_dict({"uid": [uid for uid, _ in pairs], "text": [text for _, text in pairs]})


@pytest.fixture
def model():
    return XMCModel(make_static_encoder(), labels_of(OLD))


def test_the_differences_of_two_versions_are_named(model):
    changes = model.update_labels(NEW, dry_run=True)
    assert changes.added == ["n5"]
    assert changes.removed == ["n4"]
    assert changes.renamed == {"n1": ("boat", "sailing boat"), "n2": ("car", "blue car")}
    assert changes.new_texts == {"n3": ["cat"]}
    assert changes.removed_texts == {}
    assert "2 renamed: n1: 'boat' to 'sailing boat'; n2: 'car' to 'blue car'" in str(changes)
    assert model.labels["uid"][:] == list(OLD)
    assert not model.update_labels(OLD)


@pytest.mark.parametrize("index", ["exact", "Flat", "IVF2,Flat"])
def test_an_updated_model_is_one_made_with_the_new_version(model, index):
    if index != "exact":
        model.index = FaissIndex(model.index.embeddings, factory=index)
    model.update_labels(NEW)
    expected = XMCModel(model.encoder, labels_of({uid: NEW[uid] for uid in ORDER}))
    assert model.label_texts.texts["text"][:] == expected.label_texts.texts["text"][:]
    assert model.labels["uid"][:] == ORDER
    torch.testing.assert_close(model.index.embeddings, expected.index.embeddings)
    assert model.predict(QUERIES, 2) == [
        [p._replace(score=pytest.approx(p.score, abs=1e-6)) for p in row] for row in expected.predict(QUERIES, 2)
    ]
    assert model.labels["seen"][:] == [None, None, None, False]


def test_new_labels_and_no_others_get_the_given_norm(model):
    model.update_labels(NEW, norm=3)
    added = model.label_texts.label_of == ORDER.index("n5")
    assert added.sum() == 2
    own = torch.from_numpy(model.encoder.encode(model.label_texts.texts["text"][:]))
    torch.testing.assert_close(model.index.embeddings[~added], own[~added])
    torch.testing.assert_close(model.index.embeddings[added], 3 * torch.nn.functional.normalize(own[added]))
    with pytest.raises(ValueError, match="`norm` must be positive, got 0"):
        model.update_labels(OLD, norm=0, dry_run=True)


def test_labels_that_stay_keep_their_votes(model):
    model.remember(Dataset.from_dict({"text": QUERIES[:3], "label_ids": [[0], [1, 3], [2]]}))
    model.update_labels(NEW)
    assert model.memory.relevance.toarray().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_a_failed_update_changes_nothing(model, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory")

    model.remember(Dataset.from_dict({"text": QUERIES[:1], "label_ids": [[3]]}))
    before, predictions = model.label_texts, model.predict(QUERIES)
    monkeypatch.setattr(model.index, "_become", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.update_labels(NEW)
    assert model.label_texts is before
    assert model.predict(QUERIES) == predictions


def test_only_new_texts_are_embedded(model, monkeypatch):
    embedded = []
    monkeypatch.setattr(
        "hf_xmc.model.model.embed_label_texts",
        lambda encoder, texts, norm=None, vectors=None: embedded.extend(texts) or torch.ones(len(texts), 16),
    )
    kept = model.index.embeddings[1].clone()
    model.update_labels(NEW)
    assert embedded == ["blue car", "cat", "plant", "old oak tree"]
    np.testing.assert_array_equal(model.index.embeddings[0], kept)


def test_a_list_of_names_refers_to_labels_by_their_texts():
    model = XMCModel(make_static_encoder(), ["boat", "car", "animal"])
    changes = model.update_labels(["animal", "boat", "plant"])
    assert (changes.added, changes.removed, changes.renamed) == (["plant"], ["1"], {})
    assert model.labels["uid"][:] == ["0", "2", "plant"]


def test_the_vocabulary_of_another_model_is_refused(model):
    with pytest.raises(
        ValueError, match=r"uids of the model such as 'n1', got 1 labels such as 'x1'. Are these labels for"
    ):
        model.update_labels({"x1": "ship"})
    assert model.labels["uid"][:] == list(OLD)
