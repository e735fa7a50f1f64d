"""Int8 codes: all lists give the results of exact search, and a saved model keeps the codes in a mapped file."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import make_static_encoder

from hf_xmc import FaissIndex, LabelIndex, XMCModel
from hf_xmc.search import exact, faiss_codes, faiss_index, faiss_lists
from hf_xmc.search.faiss_codes import stored_places
from hf_xmc.search.faiss_factory import SCANNED, default_factory
from hf_xmc.search.named import index_named

RNG = np.random.default_rng(0)
CENTERS = RNG.normal(size=(40, 40)).astype(np.float32)
STORED = "label_index/faiss.safetensors"


def table(rows, spread=0.6):
    """Clusters of vectors whose norms differ; 40 dimensions, which is no multiple of 16."""
    near = CENTERS[RNG.integers(0, len(CENTERS), rows)] + spread * RNG.normal(size=(rows, 40))
    return (near * RNG.lognormal(0, 0.4, (rows, 1))).astype(np.float32)


LABELS, QUERIES = table(3000), table(50)
LABELS[2000:2040] = LABELS[7]  # equal labels share a code


def same(found, other):
    np.testing.assert_array_equal(found.label_ids, other.label_ids)
    np.testing.assert_allclose(found.scores, other.scores, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@pytest.mark.parametrize("factory", ["Int8", "IVF32,Int8"])
def test_all_lists_give_the_results_of_exact_search(factory, scale):
    index, labels = FaissIndex(LABELS * np.float32(scale), factory, effort=32, refine=1), LABELS * np.float32(scale)
    for choice in ({}, {"deny": range(0, 3000, 2)}, {"allow": [7, 8, 2039]}, {"exclude": [[0, 7], [1, 2000]]}):
        same(index.search(QUERIES, 10, **choice), LabelIndex(labels).search(QUERIES, 10, **choice))
    assert index.scans


@pytest.fixture
def short_lists(monkeypatch):
    """Lists of 100 vectors of similar norms, and the share of the lists that each query visits."""
    monkeypatch.setattr(faiss_lists, "BY_NORM", 100)
    shares, visited = [], faiss_codes.visited

    def spy(index, queries, k, lists, chosen):
        shares.append((lists >= 0).sum(1) / index.nlist)
        return visited(index, queries, k, lists, chosen)

    monkeypatch.setattr(faiss_codes, "visited", spy)
    return shares


@pytest.mark.parametrize("refine", [1, 4])
def test_search_stops_at_norms_that_are_too_small_and_stays_exact(short_lists, refine):
    index = FaissIndex(LABELS, "Int8", refine=refine)
    largest = LABELS[np.argsort(-np.linalg.norm(LABELS, axis=1))[:5]]
    for query in largest[:, None]:
        short_lists.clear()
        same(index.search(query, 1), LabelIndex(LABELS).search(query, 1))
        assert sum(short_lists) < 0.5
    for choice in ({}, {"deny": range(0, 3000, 2)}, {"allow": range(1000, 2500)}, {"exclude": [[0, 7], [1, 2000]]}):
        same(index.search(QUERIES, 10, **choice), LabelIndex(LABELS).search(QUERIES, 10, **choice))
    same(index.search(QUERIES, 3000), LabelIndex(LABELS).search(QUERIES, 3000))
    zero = np.zeros((1, 40), np.float32)
    same(index.search(zero, 5), LabelIndex(LABELS).search(zero, 5))


def test_only_the_largest_norms_are_visited_if_that_is_enough(short_lists):
    index = FaissIndex(LABELS, "Int8", effort=2)
    assert not index.scans
    found = index.search(QUERIES, 10)
    assert all((share <= 2 / 30).all() for share in short_lists)
    assert (found.label_ids != LabelIndex(LABELS).search(QUERIES, 10).label_ids).any()
    assert index.tune(QUERIES, recall=0.5) >= 0.5
    assert 2 < index.effort < 16, "less than half of the lists"
    assert (index.search(QUERIES, 10, deny=range(0, 3000, 2)).label_ids % 2 == 1).all()


def test_labels_of_one_norm_fill_all_lists_and_tuning_visits_as_many_as_it_needs(monkeypatch):
    monkeypatch.setattr(faiss_lists, "BY_NORM", 100)
    labels, queries = RNG.choice(np.float32([-0.25, 0.25]), (3000, 16)), RNG.normal(size=(50, 16)).astype(np.float32)
    index = FaissIndex(labels, "Int8", effort=4)
    with monkeypatch.context() as patch:
        patch.setattr(LabelIndex, "_search_block", lambda *_: pytest.fail("all labels were scored"))
        index.search(queries, 10)
    assert index.tune(queries, recall=0.95) >= 0.95
    assert index.effort >= 24, "most of the 30 lists, because norms say nothing"
    index.effort = 2**16
    same(index.search(queries, 10), LabelIndex(labels).search(queries, 10))


def test_labels_of_larger_norm_are_added_to_the_first_list(short_lists):
    peak = np.abs(LABELS).max()  # the codes need no other factor
    largest = np.full((3, 40), peak, np.float32) * np.sign(QUERIES[:3])
    index = FaissIndex(LABELS, "Int8", refine=1)
    before = index.candidates.index
    index.add(largest)
    index.add(QUERIES[:20] / 2)
    assert index.candidates.index is before, "the codes were not computed again"
    same(index.search(QUERIES, 10), LabelIndex(index.embeddings).search(QUERIES, 10))
    again = FaissIndex.from_state(index.embeddings, "Int8", index.state(), check=False)
    same(again.search(QUERIES, 10), index.search(QUERIES, 10))


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [np.nan, 1.0], np.arange(31.0)[::-1], [], [3]])
def test_wrong_norms_of_lists_are_refused(short_lists, wrong):
    state = FaissIndex(LABELS, "Int8").state() | {"norms": np.array(wrong)}
    with pytest.raises(ValueError, match="`norms` must be"):
        FaissIndex.from_state(LABELS, "Int8", state, check=False)


def test_queries_of_unequal_numbers_and_of_zeros_are_exact():
    queries = np.where(RNG.random(QUERIES.shape) < 0.1, QUERIES * 100, QUERIES).astype(np.float32)  # coarse codes
    queries[3] = 0
    same(FaissIndex(LABELS, "Int8", refine=1).search(queries, 10), LabelIndex(LABELS).search(queries, 10))


def test_fewer_lists_are_visited_and_tuned():
    index = FaissIndex(LABELS, "IVF32,Int8", effort=1, refine=1)
    assert not index.scans
    found, best = index.search(QUERIES, 10), LabelIndex(LABELS).search(QUERIES, 10)
    assert (found.label_ids != best.label_ids).any()
    assert index.tune(QUERIES, recall=0.99) >= 0.99
    assert index.effort > 1


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("factory", ["Int8", "IVF32,Int8"])
def test_labels_are_added_to_codes(factory, mapped, tmp_path, monkeypatch):
    index = FaissIndex(LABELS, factory, effort=32)
    if mapped:
        state = index.state()
        state["codes"].tofile(tmp_path / "codes")
        state["codes"] = np.memmap(tmp_path / "codes", np.uint8, "r")
        index = FaissIndex.from_state(LABELS, factory, state, effort=32)
    built = []
    monkeypatch.setattr(type(index.candidates), "build", lambda *_: built.append(1))
    index.add(LABELS[:20] * np.float32(0.9))
    index.remove(range(100))
    index.replace([5], QUERIES[:1] / 4)
    same(index.search(QUERIES, 10), LabelIndex(index.embeddings).search(QUERIES, 10))
    assert not built


def test_mapped_codes_are_pickled(tmp_path):
    index = FaissIndex(LABELS, "IVF32,Int8", effort=32)
    state = index.state()
    state["codes"].tofile(tmp_path / "codes")
    state["codes"] = np.memmap(tmp_path / "codes", np.uint8, "r")
    pickled = pickle.dumps(FaissIndex.from_state(LABELS, "IVF32,Int8", state, effort=32))
    (tmp_path / "codes").unlink()
    same(pickle.loads(pickled).search(QUERIES, 10), index.search(QUERIES, 10))


def test_label_beyond_the_range_of_the_codes_changes_them():
    index = FaissIndex(LABELS, "Int8", refine=1)
    index.add(LABELS[:3] * np.float32(50))
    same(index.search(QUERIES, 10), LabelIndex(index.embeddings).search(QUERIES, 10))


def make_model(factory, **settings):
    names = [f"label {row}" for row in range(len(LABELS))]
    model = XMCModel(make_static_encoder(dim=40), names, torch.from_numpy(LABELS))
    model.index = FaissIndex(model.index.embeddings, factory, **settings)
    return model


@pytest.mark.parametrize("factory", ["Int8", "IVF32,Int8"])
def test_unverified_model_reads_no_embedding_and_maps_the_codes(factory, tmp_path, monkeypatch, caplog):
    make_model(factory, effort=32).save_pretrained(tmp_path / "model")
    for module, name in [(exact, "codes_of"), (exact, "_refuse_non_finite"), (faiss_index, "vectors_of")]:
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the embeddings were read"))
    model = XMCModel.from_pretrained(tmp_path / "model", verify=False)
    monkeypatch.undo()
    assert (type(model.index), model.index.factory) == (FaissIndex, factory)
    assert str(tmp_path / "model" / STORED) in Path("/proc/self/maps").read_text()
    same(model.index.search(QUERIES, 10), LabelIndex(LABELS).search(QUERIES, 10))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    model.add_labels(["a new label"])
    model.remove_labels(["3", "2000"])
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", verify=False)
    same(again.index.search(QUERIES, 10), LabelIndex(model.index.embeddings).search(QUERIES, 10))


def test_unverified_index_of_other_embeddings_is_rebuilt_if_its_size_differs(tmp_path, caplog):
    make_model("Int8").save_pretrained(tmp_path / "model")
    state = FaissIndex(LABELS[:-1], "Int8").state()
    with pytest.raises(ValueError, match=r"`places` must be a table of int64 with shape \(3000,\)"):
        FaissIndex.from_state(LABELS, "Int8", state, check=False)
    content = (tmp_path / "model" / STORED).read_bytes()
    (tmp_path / "model" / STORED).write_bytes(b"\xff" * len(content))
    model = XMCModel.from_pretrained(tmp_path / "model", verify=False)
    assert "the index is rebuilt from the embeddings" in caplog.text
    same(model.index.search(QUERIES, 10), LabelIndex(LABELS).search(QUERIES, 10))


@pytest.mark.parametrize("wrong", [[0, 2, 1], [1, 0, 2], [0, -1, 1], [0, 3, 1]])
def test_places_in_another_order_are_refused(wrong):
    assert stored_places({"places": np.array([0, 1, 0, 2])}, 4).tolist() == [0, 1, 0, 2]
    with pytest.raises(ValueError, match="`places` must number the distinct embeddings"):
        stored_places({"places": np.array(wrong)}, 3)


def test_default_depends_on_the_number_of_labels_and_is_said(caplog):
    assert default_factory(SCANNED) == "Int8"
    assert default_factory(SCANNED + 1) == "IVF1024,Int8"
    with caplog.at_level(logging.INFO):
        assert FaissIndex(LABELS).factory == "Int8"
    assert "3000 labels are indexed with 'Int8', the default for this number." in caplog.text


def test_index_is_chosen_by_name(monkeypatch, caplog):
    labels = torch.from_numpy(LABELS)
    with caplog.at_level(logging.INFO):
        assert type(index_named("auto", labels)) is LabelIndex
    assert "3000 labels are few: every search scores them all." in caplog.text
    monkeypatch.setattr("hf_xmc.search.named.FEW", 2999)
    assert index_named("auto", labels).factory == "Int8"
    assert type(index_named("exact", labels)) is LabelIndex
    assert index_named("IVF8,Int8", labels).factory == "IVF8,Int8"
    with pytest.raises(ValueError, match="`factory` 'autos' cannot be used"):
        index_named("autos", labels)


def test_model_takes_an_index_and_the_name_of_an_index():
    names = [f"label {row}" for row in range(len(LABELS))]
    given = FaissIndex(LABELS, "Int8")
    model = XMCModel(make_static_encoder(dim=40), names, given)
    assert model.index is given
    model.index = "IVF8,Int8"
    assert model.index.factory == "IVF8,Int8"
    assert model.index.embeddings.data_ptr() == given.embeddings.data_ptr(), "they are not copied"
    model.index = "exact"
    assert type(model.index) is LabelIndex
    with pytest.raises(ValueError, match="`index` must be of 3000 label texts"):
        XMCModel(model.encoder, names, FaissIndex(LABELS[1:], "Int8"))


def test_few_visible_labels_are_scored_alone(monkeypatch):
    index, allowed, full = LabelIndex(LABELS), [5, 7, 1000, 2001, 2039, 2999], LabelIndex(LABELS).search(QUERIES, 3000)
    excluded = np.array([[0, 5], [3, 2001], [3, 9], [9, 2999]])
    pairs = set(map(tuple, excluded.tolist()))
    sizes = []
    best_of = exact._top_k
    monkeypatch.setattr(exact, "_top_k", lambda scores, k: sizes.append(scores.shape[1]) or best_of(scores, k))
    found = index.search(QUERIES, 8, allow=allowed, exclude=excluded)
    assert max(sizes) < 10
    for row, labels in enumerate(full.label_ids.tolist()):
        right = [label for label in labels if label in allowed and (row, label) not in pairs]
        assert [label for label in found.label_ids[row].tolist() if label >= 0] == right
    assert (index.search(QUERIES, 3, allow=[]).label_ids == -1).all()
