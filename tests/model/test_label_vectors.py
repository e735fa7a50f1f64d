"""A model whose labels have vectors of their own, in addition to their texts."""

import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS, POSITIVES, make_static_encoder, several_texts
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from hf_xmc import FaissIndex, XMCModel

FORMS = ["plain", "normalised", "cosine"]


def make_model(form="plain", labels=LABELS):
    encoder = make_static_encoder()
    if form == "normalised":
        encoder.append(Normalize())
    if form == "cosine":
        encoder.similarity_fn_name = "cosine"
    vectors = torch.randn(11, 16, generator=torch.Generator().manual_seed(1))
    vectors[3] = 0  # a label without a vector
    return XMCModel(encoder, labels, label_vectors=vectors), vectors


def expected(model, texts, vectors):
    """The embeddings of texts with the vectors of their labels, by the formula."""
    embeddings = torch.from_numpy(model.encoder.encode_document(texts)) + vectors
    unit = isinstance(model.encoder[-1], Normalize) or model.encoder.similarity_fn_name == "cosine"
    return embeddings / embeddings.norm(dim=1, keepdim=True) if unit else embeddings


@pytest.mark.parametrize("form", FORMS)
def test_index_has_the_sum_of_text_and_vector(form):
    model, vectors = make_model(form)
    torch.testing.assert_close(model.index.embeddings, expected(model, LABELS, vectors))


def test_every_text_of_a_label_gets_its_vector():
    labels, _ = several_texts()
    model, vectors = make_model(labels=labels)
    table = model.label_texts
    torch.testing.assert_close(
        model.index.embeddings, expected(model, list(table.texts["text"]), vectors[torch.from_numpy(table.label_of)])
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("faiss", [False, True])
def test_saved_model_loads_with_its_vectors(form, faiss, tmp_path):
    model, vectors = make_model(form)
    if faiss:
        model.index = FaissIndex(model.index.embeddings, factory="Flat")
    model.remember(Dataset.from_dict({"text": [f"text {i} boat" for i in range(13)], "label_ids": POSITIVES}))
    model.save_pretrained(tmp_path / "model")
    loaded = XMCModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.label_vectors, vectors)
    assert torch.equal(loaded.index.embeddings, model.index.embeddings)
    assert loaded.predict("an old red boat") == model.predict("an old red boat")
    assert torch.equal(
        XMCModel.from_pretrained(tmp_path / "model", parts=["label_index"]).label_vectors, model.label_vectors
    )
    plain = SentenceTransformer(str(tmp_path / "model"))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.encoder.named_parameters()]
    loaded.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "label_index" / "label_vectors.safetensors").read_bytes()
    assert again == (tmp_path / "model" / "label_index" / "label_vectors.safetensors").read_bytes()


def test_model_without_vectors_saves_no_file_for_them(tmp_path):
    model = XMCModel(make_static_encoder(), LABELS)
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model" / "label_index").iterdir()) == [
        "embeddings.safetensors",
        "labels.parquet",
    ]
    assert XMCModel.from_pretrained(tmp_path / "model").label_vectors is None


def test_encoder_alone_and_other_labels_have_no_vectors(tmp_path, caplog):
    model, _ = make_model()
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model", parts=()).label_vectors is None
    assert not caplog.text
    other = XMCModel.from_pretrained(tmp_path / "model", labels=["boat", "car"])
    assert other.label_vectors is None
    assert "have vectors of their own, which the given labels lack" in caplog.text


def test_modified_file_of_vectors_is_refused(tmp_path):
    make_model()[0].save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "label_index" / "label_vectors.safetensors"
    shutil.copy(tmp_path / "model" / "label_index" / "embeddings.safetensors", path)
    with pytest.raises(ValueError, match="is not the file that was saved"):
        XMCModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("form", FORMS)
def test_changed_labels_keep_their_vectors_and_new_ones_have_none(form):
    model, vectors = make_model(form)
    model.rename_label("5", "old dog")
    model.add_labels(["red boat", "blue car"])
    model.remove_labels(["0", "7", "12"])
    kept = [row for row in range(11) if row not in (0, 7)]
    texts = [LABELS[row] if row != 5 else "old dog" for row in kept]
    now = torch.cat([vectors[kept], torch.zeros(1, 16)])
    assert torch.equal(model.label_vectors, now)
    torch.testing.assert_close(model.index.embeddings, expected(model, [*texts, "red boat"], now))


def test_loaded_part_of_the_labels_has_the_vectors_of_that_part(tmp_path):
    model, vectors = make_model()
    model.save_pretrained(tmp_path / "model")
    some = XMCModel.from_pretrained(tmp_path / "model", deny=["0", "4"])
    assert torch.equal(some.label_vectors, vectors[[1, 2, 3, 5, 6, 7, 8, 9, 10]])


def test_new_texts_in_another_version_of_the_vocabulary_get_the_vector_of_their_label():
    model, vectors = make_model()
    model.update_labels({"7": ["red", "old red"], "new": "blue boat", "0": "old boat"})
    table = model.label_texts
    assert table.labels["uid"] == ["0", "7", "new"]
    now = torch.stack([vectors[0], vectors[7], torch.zeros(16)])
    assert torch.equal(model.label_vectors, now)
    torch.testing.assert_close(
        model.index.embeddings, expected(model, list(table.texts["text"]), now[torch.from_numpy(table.label_of)])
    )


@pytest.mark.parametrize("form", FORMS)
def test_explanation_has_the_part_of_the_vector(form):
    model, vectors = make_model(form)
    query = model.embed(["an old red boat"])[0]
    found = model.explain("an old red boat", "0")
    whole = torch.from_numpy(model.encoder.encode_document([LABELS[0]])[0]) + vectors[0]
    scale = 1 if form == "plain" else 1 / float(whole.norm())
    assert found.vector_score == pytest.approx(scale * float(query @ vectors[0]), rel=1e-4)
    lines = str(found).splitlines()
    assert lines[2].startswith(f"  of that score, {found.vector_score:+.3f} by the label itself, ")
    assert f"a score of {found.label_score:.3f}" in lines[1] or lines[1] == f"  label score {found.label_score:.3f}"
    if found.words_add_up:
        assert sum(word.weight for word in found.words) == pytest.approx(found.label_score, rel=1e-4)
    assert model.explain("an old red boat", "3").vector_score is None
    assert "by the label itself" not in str(model.explain("an old red boat", "3"))


def test_explanation_is_of_the_best_text_of_a_label():
    labels, _ = several_texts()
    model, vectors = make_model(labels=labels)
    query = model.embed(["an old red boat"])[0]
    assert model.explain("an old red boat", "L0").vector_score == pytest.approx(float(query @ vectors[0]), rel=1e-4)


def test_vectors_of_another_number_of_labels_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(11, 16\), a row for each label, got \(10, 16\)"):
        XMCModel(make_static_encoder(), LABELS, label_vectors=np.zeros((10, 16)))
