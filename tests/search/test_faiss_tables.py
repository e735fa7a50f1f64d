"""An index is restored from its tables; forged tables, and those of another index, are refused."""

import json
import logging
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from helpers.tampering import forge
from helpers.tiny import make_static_encoder
from safetensors.numpy import load_file, save

from hf_xmc import FaissIndex, LabelIndex, XMCModel
from hf_xmc.search.faiss_tables import checked_settings, most_bytes

STORED = "label_index/faiss.safetensors"
TEXTS = ["a red boat", "old oak tree", "dog and cat"]
WITH_TABLES = ["HNSW8", "HNSW32", "IVF6,Flat", "IVF6,SQ8", "IVF6,Int8", "IVF6,PQ1x4", "PCAR4,IVF6,SQ8", "PCAR4,HNSW8"]


def table(rows=300, seed=0):
    """Lengths differ; numbers that half precision holds."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 16)) * rng.uniform(0.5, 2, (rows, 1))).astype(np.float16).astype(np.float32)


QUERIES, LABELS = table(20, seed=1), table()


def same(found, other):
    np.testing.assert_array_equal(found.label_ids, other.label_ids)
    np.testing.assert_array_equal(found.scores, other.scores)


@pytest.mark.parametrize("factory", WITH_TABLES)
def test_index_is_restored_from_its_tables(factory):
    index = FaissIndex(LABELS, factory, effort=1, refine=1)
    again = FaissIndex.from_state(LABELS, factory, index.state(), effort=1, refine=1)
    same(again.search(QUERIES, 10), index.search(QUERIES, 10))
    assert not np.array_equal(index.search(QUERIES, 2).label_ids, LabelIndex(LABELS).search(QUERIES, 2).label_ids)
    again.add(table(5, seed=2) / 4)
    again.effort, again.refine = 300, 300
    found, exact = again.search(QUERIES, 10), LabelIndex(again.embeddings).search(QUERIES, 10)
    np.testing.assert_array_equal(found.label_ids, exact.label_ids)


def test_tables_are_used_instead_of_rebuilding():
    state = FaissIndex(LABELS, "HNSW8").state()
    state["neighbors"][:] = -1  # a graph without a link: search ends where it enters
    _, places = FaissIndex.from_state(LABELS, "HNSW8", state).candidates.nearest(QUERIES, 10, None)
    assert (places[:, 0] == state["entry_point"]).all()
    assert (places[:, 1:] == -1).all()
    state = FaissIndex(LABELS, "IVF6,SQ8").state()
    state["lists"][:] = 5
    index = FaissIndex.from_state(LABELS, "IVF6,SQ8", state)
    assert [index.candidates.index.invlists.list_size(number) for number in range(6)] == [0, 0, 0, 0, 0, 300]


@pytest.mark.parametrize("factory", ["HNSW8", "IVF6,SQ8", "Int8", "IVF6,Int8"])
def test_removed_labels_are_not_in_the_tables(factory):
    index = FaissIndex(LABELS, factory, refine=1)
    index.remove([0, 7, 299])
    index.replace([5], LABELS[:1])
    again = FaissIndex.from_state(index.embeddings, factory, index.state(), refine=1)
    same(again.search(QUERIES, 10), index.search(QUERIES, 10))
    assert again.candidates.index.ntotal == 297


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "SQfp16", "PQ1x4"])
def test_index_without_graph_or_lists_has_no_tables(factory):
    assert FaissIndex(LABELS, factory).state() == {}


def changed(state, name, change):
    state = {key: value.copy() for key, value in state.items()}
    state[name] = change(state[name], state)
    return state


def put(place, value):
    def change(array, _):
        array.flat[place] = value
        return array

    return change


def link_above(array, state):
    """From the entry point, on level 1, to a node that is on level 0 only."""
    index = faiss.IndexHNSWFlat(16, 8)
    links = faiss.vector_to_array(index.hnsw.cum_nneighbor_per_level)[state["levels"]]
    array[links[: state["entry_point"][0]].sum() + 16] = np.flatnonzero(state["levels"] == 1)[0]
    return array


FORGED = {
    "HNSW8": {
        "a neighbor too far": ("neighbors", put(40, 300), "`neighbors` must be node numbers below 300"),
        "a neighbor before all": ("neighbors", put(40, -2), "`neighbors` must be node numbers below 300"),
        "a link above its node": ("neighbors", link_above, "must be on the level of their link"),
        "a link fewer": ("neighbors", lambda array, _: array[:-1], "`neighbors` must be a table of int32 with shape"),
        "wide neighbors": ("neighbors", lambda array, _: array.astype(np.int64), "`neighbors` must be a table"),
        "a node fewer": (
            "levels",
            lambda array, _: array[1:],
            r"`levels` must be .* of int32 with shape \(300,\)",
        ),
        "a node on no level": ("levels", put(3, 0), "`levels` must be from 1 to"),
        "a node on a negative level": ("levels", put(3, -5), "`levels` must be from 1 to"),
        "a node on a level too high": ("levels", put(3, 2**30), "`levels` must be from 1 to"),
        "another number of levels": ("levels", put(3, 5), "`neighbors` must be a table of int32 with shape"),
        "an entry too far": ("entry_point", put(0, 300), "`neighbors` must be node numbers below 300"),
        "an entry before all": ("entry_point", put(0, -1), "`neighbors` must be node numbers below 300"),
        "an entry at the bottom": (
            "entry_point",
            lambda array, state: np.flatnonzero(state["levels"] == 1)[:1].astype(np.int32),
            "must be on the highest level",
        ),
        "two entries": ("entry_point", lambda array, _: np.append(array, array), "`entry_point` must be a table"),
        "another metric": ("metric", put(0, faiss.METRIC_L2), "of another metric or dimension"),
        "another dimension": ("metric", put(1, 17), "of another metric or dimension"),
        "lists": ("levels", lambda array, _: np.zeros((6, 16), np.float32), "`levels` must be a table"),
    },
    "IVF6,SQ8": {
        "a list too far": ("lists", put(40, 6), "`lists` must hold list numbers from 0 to nlist - 1"),
        "a list before all": ("lists", put(40, -1), "`lists` must hold list numbers from 0 to nlist - 1"),
        "a vector fewer": ("lists", lambda array, _: array[1:], "`lists` must be a table"),
        "a center fewer": (
            "centroids",
            lambda array, _: array[1:],
            r"`centroids` must be .* with shape \(6, 16\)",
        ),
        "narrow centers": ("centroids", lambda array, _: array[:, 1:], "`centroids` must be a table"),
        "a center nowhere": ("centroids", put(3, np.nan), "`lists` must hold list numbers from 0 to nlist - 1"),
    },
    "IVF6,Int8": {
        "signed codes": ("codes", lambda array, _: array.view(np.int8), "`codes` must be a table"),
        "few codes": ("codes", lambda array, _: array[:-1], "`codes` must be a table"),
        "a place twice": ("codes", lambda array, _: np.append(array[:-8], array[-16:-8]), "hold each place below 300"),
        "a place too far": ("codes", put(-1, 127), "hold each place below 300"),
        "sizes of more": ("sizes", put(0, 300), "`sizes` must be those of lists of 300 vectors"),
        "a negative size": ("sizes", put(0, -1), "`sizes` must be those of lists of 300 vectors"),
        "no scale": ("numbers", put(0, 0), "`centroids` and `numbers` must be finite"),
        "an infinite error": ("numbers", put(1, np.inf), "`centroids` and `numbers` must be finite"),
        "a center nowhere": ("centroids", put(3, np.nan), "`centroids` and `numbers` must be finite"),
        "other vectors": ("vectors", put(0, 1), "the tables belong to other embeddings"),
    },
}
CASES = [(factory, case) for factory, cases in FORGED.items() for case in cases]


@pytest.mark.parametrize(("factory", "case"), CASES)
def test_forged_tables_are_refused(factory, case):
    name, change, wrong = FORGED[factory][case]
    state = FaissIndex(LABELS, factory).state()
    with pytest.raises(ValueError, match=wrong):
        FaissIndex.from_state(LABELS, factory, changed(state, name, change))


def test_tables_of_another_index_are_refused():
    graph, lists = (FaissIndex(LABELS, factory).state() for factory in ("HNSW8", "IVF6,SQ8"))
    for factory, state in [("HNSW8", lists), ("IVF6,SQ8", graph), ("HNSW16", graph), ("IVF7,SQ8", lists)]:
        with pytest.raises(ValueError, match=r"must be a table|of another metric or dimension"):
            FaissIndex.from_state(LABELS, factory, state)
    with pytest.raises(ValueError, match="this index has no graph or lists"):
        FaissIndex.from_state(LABELS, "SQ8", graph)
    with pytest.raises(ValueError, match="`metric` must be a table"):
        FaissIndex.from_state(LABELS, "HNSW8", {})


@pytest.mark.parametrize("factory", WITH_TABLES)
def test_size_bound_covers_the_tables(factory):
    for rows in (30, 2000):
        index = FaissIndex(table(rows), factory)
        size = len(save(index.state()))
        assert size <= most_bytes(factory, rows, 16) <= 4 * size + 2**17


@pytest.mark.parametrize(
    "said",
    [
        {"factory": "IVF999999999,Flat"},
        {"factory": "IVF301,Flat"},
        {"factory": "HNSW100000"},
        {"factory": "HNSW1"},
        {"factory": "HNSW0"},
        {"factory": "PCA17,SQ8"},
        {"factory": "PQ0"},
        {"factory": "Flat,RFlat"},
        {"factory": "IDMap,Flat"},
        {"factory": "HNSW32\n"},
        {"factory": None},
        {"factory": ["HNSW32"]},
        {"effort": 0},
        {"effort": 2**40},
        {"effort": True},
        {"effort": "64"},
        {"refine": -1},
        {"refine": 1.5},
        {"refine": None},
    ],
)
def test_settings_without_a_memory_bound_are_ignored(said, saved, caplog):
    part = json.loads((saved / "xmc_config.json").read_text())["parts"]["label_index"]
    forge(saved, parts={"label_index": {**part, "faiss": {**part["faiss"], **said}}})
    model = XMCModel.from_pretrained(saved)
    assert type(model.index) is LabelIndex
    assert "; all rows are searched instead" in caplog.text
    with pytest.raises(ValueError, match=r"refusing to build the index|must be integers from 1 to 65536"):
        checked_settings({"factory": "HNSW8", "effort": 1, "refine": 1, **said}, 300, 16)


def test_settings_that_faiss_refuses_are_an_error(saved):
    part = json.loads((saved / "xmc_config.json").read_text())["parts"]["label_index"]
    forge(saved, parts={"label_index": {**part, "faiss": {**part["faiss"], "factory": "IVF4,PQ5"}}})
    with pytest.raises(ValueError, match="no index IVF4,PQ5 can be made"):
        XMCModel.from_pretrained(saved)
    forge(saved, parts={"label_index": {**part, "faiss": "HNSW8"}})
    assert type(XMCModel.from_pretrained(saved).index) is LabelIndex


def make_model(factory="HNSW8", **settings):
    model = XMCModel(make_static_encoder(), [f"label {row}" for row in range(300)], torch.from_numpy(LABELS))
    model.index = FaissIndex(model.index.embeddings, factory, **settings)
    return model


@pytest.fixture
def saved(tmp_path):
    make_model(effort=3, refine=2).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("factory", ["HNSW8", "IVF6,SQ8", "SQ8", "Int8", "IVF6,Int8"])
def test_saved_model_finds_the_same_labels(factory, tmp_path, caplog):
    model = make_model(factory, effort=3, refine=2)
    model.remove_labels(["3"])
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model")
    assert type(again.index) is FaissIndex
    assert (again.index.factory, again.index.effort, again.index.refine) == (factory, 3, 2)
    assert (tmp_path / "model" / STORED).exists() == (factory != "SQ8")
    assert again.predict(TEXTS, top_k=9) == model.predict(TEXTS, top_k=9)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "model" / "label_index" / "embeddings.safetensors") in mapped, "they are not read, but mapped"
    model.index = LabelIndex(model.index.embeddings)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / STORED).exists()
    assert type(XMCModel.from_pretrained(tmp_path / "model").index) is LabelIndex


def test_index_loads_without_denied_labels(saved, caplog):
    model = XMCModel.from_pretrained(saved, deny=["3", "299"])
    assert (model.index.candidates.index.ntotal, model.index.factory) == (298, "HNSW8")
    assert caplog.text == ""
    whole = make_model(effort=3, refine=2)
    whole.remove_labels(["3", "299"])
    whole.index = FaissIndex(whole.index.embeddings, "HNSW8", effort=3, refine=2)
    assert model.predict(TEXTS, top_k=9) == whole.predict(TEXTS, top_k=9)


def test_modified_table_file_is_not_read(saved, caplog, monkeypatch):
    monkeypatch.setattr("hf_xmc.hub.saved_index._read_arrays", lambda *_: pytest.fail("it was read"))
    predictions, content = make_model(effort=3, refine=2).predict(TEXTS, top_k=9), (saved / STORED).read_bytes()
    for other in (content[:-1], b"", b"x" + content[1:], None):
        (saved / STORED).unlink()
        if other is not None:
            (saved / STORED).write_bytes(other)
        assert XMCModel.from_pretrained(saved).predict(TEXTS, top_k=9) == predictions
        wrong = "missing" if other is None else "not the file that was saved"
        assert f"faiss.safetensors is {wrong}: the index is rebuilt from the embeddings" in caplog.text
        caplog.clear()
        (saved / STORED).write_bytes(content)
    monkeypatch.undo()
    assert XMCModel.from_pretrained(saved).predict(TEXTS, top_k=9) == predictions
    assert caplog.text == ""


def test_index_is_rebuilt_if_a_forged_file_has_a_valid_manifest(saved, caplog):
    predictions, stored = make_model(effort=3, refine=2).predict(TEXTS, top_k=9), load_file(saved / STORED)
    faiss_file = saved / "faiss"
    faiss.write_index(faiss.index_factory(17, "HNSW8"), str(faiss_file))
    forged = {
        "a table too large": save({**stored, "more": np.zeros(2**17, np.int32)}),
        "a neighbor too far": save({**stored, "neighbors": np.full_like(stored["neighbors"], 300)}),
        "other numbers": save({**stored, "levels": stored["levels"].astype(np.float16)}),
        "a header too long": (2**62).to_bytes(8, "little") + b"{}",
        "an index of FAISS": faiss_file.read_bytes(),
        "nothing": b"",
    }
    faiss_file.unlink()
    for case, content in forged.items():
        forge(saved, {STORED: content})
        again = XMCModel.from_pretrained(saved)
        assert "holds no such index" in caplog.text, case
        assert "the index is rebuilt from the embeddings" in caplog.text, case
        assert again.predict(TEXTS, top_k=9) == predictions, case
        caplog.clear()
    forge(saved, {STORED: forged["a table too large"]})
    XMCModel.from_pretrained(saved)
    assert f"more than {most_bytes('HNSW8', 300, 16)} bytes" in caplog.text


def test_no_faiss_file_is_ever_read():
    package = Path(__file__).parents[2] / "hf_xmc"
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    assert "read_index(" in sources, "ours; the pattern below finds what it looks for"
    assert not [name for name in ("faiss.read", "faiss.deserialize", "faiss.clone") if name in sources]
