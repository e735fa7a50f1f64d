"""An index comes back from its tables as it was; tables that are none, or not its own, lead nowhere."""

import json
import logging
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import make_static_encoder
from forge import forge
from safetensors.numpy import load_file, save

from hf_xmc import FaissIndex, LabelIndex, XMCModel
from hf_xmc.search.faiss_tables import checked_settings, most_bytes

STORED = "label_index/faiss.safetensors"
TEXTS = ["a red boat", "old oak tree", "dog and cat"]
WITH_TABLES = ["HNSW8", "HNSW32", "IVF6,Flat", "IVF6,SQ8", "IVF6,PQ1x4", "PCAR4,IVF6,SQ8", "PCAR4,HNSW8"]


def table(rows=300, seed=0):
    """Lengths differ; numbers that half precision holds."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 16)) * rng.uniform(0.5, 2, (rows, 1))).astype(np.float16).astype(np.float32)


QUERIES, LABELS = table(20, seed=1), table()


def same(found, other):
    np.testing.assert_array_equal(found.label_ids, other.label_ids)
    np.testing.assert_array_equal(found.scores, other.scores)


@pytest.mark.parametrize("factory", WITH_TABLES)
def test_an_index_comes_back_from_its_tables(factory):
    index = FaissIndex(LABELS, factory, effort=1, refine=1)
    again = FaissIndex(LABELS, factory, effort=1, refine=1, state=index.state())
    same(again.search(QUERIES, 10), index.search(QUERIES, 10))
    assert not np.array_equal(index.search(QUERIES, 2).label_ids, LabelIndex(LABELS).search(QUERIES, 2).label_ids)
    again.add(table(5, seed=2) / 4)
    again.effort, again.refine = 300, 300
    found, exact = again.search(QUERIES, 10), LabelIndex(again.embeddings).search(QUERIES, 10)
    np.testing.assert_array_equal(found.label_ids, exact.label_ids)


def test_tables_are_used_and_not_made_again():
    state = FaissIndex(LABELS, "HNSW8").state()
    state["neighbors"][:] = -1  # a graph without a link: search ends where it enters
    _, places = FaissIndex(LABELS, "HNSW8", state=state)._propose(QUERIES, 10, None)
    assert (places[:, 0] == state["entry_point"]).all()
    assert (places[:, 1:] == -1).all()
    state = FaissIndex(LABELS, "IVF6,SQ8").state()
    state["lists"][:] = 5
    index = FaissIndex(LABELS, "IVF6,SQ8", state=state)
    assert [index._index.invlists.list_size(number) for number in range(6)] == [0, 0, 0, 0, 0, 300]


@pytest.mark.parametrize("factory", ["HNSW8", "IVF6,SQ8"])
def test_labels_that_went_are_not_in_the_tables(factory):
    index = FaissIndex(LABELS, factory, refine=1)
    index.remove([0, 7, 299])
    index.replace([5], LABELS[:1])
    again = FaissIndex(index.embeddings, factory, refine=1, state=index.state())
    same(again.search(QUERIES, 10), index.search(QUERIES, 10))
    assert again._index.ntotal == 297


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "SQfp16", "PQ1x4"])
def test_codes_that_are_scanned_have_no_tables(factory):
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
        "a neighbor too far": ("neighbors", put(40, 300), "neighbors must be node numbers"),
        "a neighbor before all": ("neighbors", put(40, -2), "neighbors must be node numbers"),
        "a link above its node": ("neighbors", link_above, "not on the level of the link"),
        "a link fewer": ("neighbors", lambda array, _: array[:-1], "no table neighbors of the shape"),
        "wide neighbors": ("neighbors", lambda array, _: array.astype(np.int64), "no table neighbors"),
        "a node fewer": ("levels", lambda array, _: array[1:], r"no table levels of the shape \(300,\)"),
        "a node on no level": ("levels", put(3, 0), "levels that no graph has"),
        "a node on a negative level": ("levels", put(3, -5), "levels that no graph has"),
        "a node on a level too high": ("levels", put(3, 2**30), "levels that no graph has"),
        "another number of levels": ("levels", put(3, 5), "no table neighbors of the shape"),
        "an entry too far": ("entry_point", put(0, 300), "neighbors must be node numbers"),
        "an entry before all": ("entry_point", put(0, -1), "neighbors must be node numbers"),
        "an entry at the bottom": (
            "entry_point",
            lambda array, state: np.flatnonzero(state["levels"] == 1)[:1].astype(np.int32),
            "an entry point below the top",
        ),
        "two entries": ("entry_point", lambda array, _: np.append(array, array), "no table entry_point"),
        "another metric": ("metric", put(0, faiss.METRIC_L2), "of another metric or dimension"),
        "another dimension": ("metric", put(1, 17), "of another metric or dimension"),
        "lists": ("levels", lambda array, _: np.zeros((6, 16), np.float32), "no table levels"),
    },
    "IVF6,SQ8": {
        "a list too far": ("lists", put(40, 6), "lists must be from 0"),
        "a list before all": ("lists", put(40, -1), "lists must be from 0"),
        "a vector fewer": ("lists", lambda array, _: array[1:], "no table lists"),
        "a center fewer": ("centroids", lambda array, _: array[1:], r"no table centroids of the shape \(6, 16\)"),
        "narrow centers": ("centroids", lambda array, _: array[:, 1:], "no table centroids"),
        "a center nowhere": ("centroids", put(3, np.nan), "lists must be from 0"),
    },
}
CASES = [(factory, case) for factory, cases in FORGED.items() for case in cases]


@pytest.mark.parametrize(("factory", "case"), CASES)
def test_forged_tables_are_refused(factory, case):
    name, change, wrong = FORGED[factory][case]
    state = FaissIndex(LABELS, factory).state()
    with pytest.raises(ValueError, match=wrong):
        FaissIndex(LABELS, factory, state=changed(state, name, change))


def test_tables_of_another_kind_are_refused():
    graph, lists = (FaissIndex(LABELS, factory).state() for factory in ("HNSW8", "IVF6,SQ8"))
    for factory, state in [("HNSW8", lists), ("IVF6,SQ8", graph), ("HNSW16", graph), ("IVF7,SQ8", lists)]:
        with pytest.raises(ValueError, match=r"no table|of another metric or dimension"):
            FaissIndex(LABELS, factory, state=state)
    with pytest.raises(ValueError, match="an index that has no tables"):
        FaissIndex(LABELS, "SQ8", state=graph)
    with pytest.raises(ValueError, match="no table metric"):
        FaissIndex(LABELS, "HNSW8", state={})


@pytest.mark.parametrize("factory", WITH_TABLES)
def test_the_bound_holds_the_tables(factory):
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
def test_settings_without_a_bound_are_not_followed(said, saved, caplog):
    part = json.loads((saved / "xmc_config.json").read_text())["parts"]["label_index"]
    forge(saved, parts={"label_index": {**part, "faiss": {**part["faiss"], **said}}})
    model = XMCModel.from_pretrained(saved)
    assert type(model.index) is LabelIndex
    assert "; all labels are searched instead" in caplog.text
    with pytest.raises(ValueError, match=r"is built from a file|must be whole numbers from 1 to 65536"):
        checked_settings({"factory": "HNSW8", "effort": 1, "refine": 1, **said}, 300, 16)


def test_settings_that_faiss_refuses(saved):
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


@pytest.mark.parametrize("factory", ["HNSW8", "IVF6,SQ8", "SQ8"])
def test_a_saved_model_searches_as_it_did(factory, tmp_path, caplog):
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


def test_labels_that_are_left_out_are_not_in_the_index(saved, caplog):
    model = XMCModel.from_pretrained(saved, deny=["3", "299"])
    assert (model.index._index.ntotal, model.index.factory) == (298, "HNSW8")
    assert caplog.text == ""
    whole = make_model(effort=3, refine=2)
    whole.remove_labels(["3", "299"])
    whole.index = FaissIndex(whole.index.embeddings, "HNSW8", effort=3, refine=2)
    assert model.predict(TEXTS, top_k=9) == whole.predict(TEXTS, top_k=9)


def test_a_file_that_is_not_the_one_saved_is_not_read(saved, caplog, monkeypatch):
    monkeypatch.setattr("hf_xmc.hub.release._read_arrays", lambda *_: pytest.fail("it was read"))
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


def test_a_forged_file_under_a_manifest_that_fits_is_built_anew(saved, caplog):
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


def test_no_file_of_faiss_is_ever_read():
    package = Path(__file__).parents[1] / "hf_xmc"
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    assert "read_index(" in sources, "ours; the pattern below finds what it looks for"
    assert not [name for name in ("faiss.read", "faiss.deserialize", "faiss.clone") if name in sources]
