"""If an inner call of a change fails, the model is unchanged and can be changed again."""

import functools

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import LABELS

from hf_xmc import FaissIndex, LabelIndex, MemorySettings, MilvusIndex, XMCModel
from hf_xmc.data import labels
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.model import embeddings, model, own_votes
from hf_xmc.search import approximate, candidates, exact, faiss_index, memory

TEXTS = ["a red boat", "old oak tree", "dog and cat"]
WATCHED = [
    (embeddings, "encode_labels"),
    (exact, "codes_of"),
    (exact, "first_equal"),
    (exact, "Groups"),
    (approximate, "Groups"),
    (approximate, "vectors_of"),
    (candidates, "vectors_of"),
    (faiss_index, "made_of"),
    (faiss.IndexHNSWFlat, "add"),
    (faiss.IndexIVFScalarQuantizer, "add"),
    (faiss.IndexIVFScalarQuantizer, "train"),
    (labels.LabelTexts, "added"),
    (labels.LabelTexts, "kept"),
    (labels.LabelTexts, "renamed"),
    (memory.TrainingMemory, "keep_labels"),
    (memory, "_binary"),
    (memory, "unit_rows"),
    (torch.Tensor, "index_copy"),
    (torch, "cat"),
]
CHANGES = {
    "add": lambda changed: changed.add_labels(["a red dog", "boat", "old car"]),
    "remove": lambda changed: changed.remove_labels(["3", "0", "7", "9"]),
    "rename": lambda changed: changed.rename_label("4", "old red car"),
    "remember": lambda changed: changed.remember(Dataset.from_dict({"text": ["car car"], "label_ids": [[5, 2]]})),
}
KINDS = ["exact", "HNSW8", "IVF8,SQ8", "SQ8"]


class Failing:
    """Calls of what is watched, of which one fails: number ``at``, before its work or after it."""

    def __init__(self, monkeypatch, watched, at=None, after=False):
        self.calls, self.at, self.after = 0, at, after
        for owner, name in watched:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function):
        @functools.wraps(function, updated=())
        def call(*args, **kwargs):
            self.calls += 1
            fails = self.calls - 1 == self.at
            if fails and not self.after:
                raise RuntimeError("out of memory")
            result = function(*args, **kwargs)
            if fails:
                raise RuntimeError("out of memory")
            return result

        return call


@pytest.fixture
def fresh(encoder, queries):
    def make(kind):
        made = XMCModel(encoder, LABELS)
        if kind != "exact":
            made.index = FaissIndex(made.index.embeddings, kind, refine=1)
        made.remember(queries)
        made.memory.settings = MemorySettings(neighbors=4, mix=0.5)
        return made

    return make


def state_of(changed):
    found = changed.index.search(changed.embed(TEXTS), 20)
    return (
        changed.predict(TEXTS, 20),
        changed.labels[:],
        changed.memory.relevance.toarray().tolist(),
        (changed.memory.texts, changed.memory.index.num_labels),
        changed.index.embeddings.tolist(),
        found.label_ids.tolist(),
        found.scores.tolist(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_model_is_unchanged_whichever_inner_call_fails(change, kind, fresh):
    whole, rehearsed = fresh(kind), fresh(kind)
    before = state_of(whole)
    with pytest.MonkeyPatch.context() as patch:
        calls = Failing(patch, WATCHED)
        CHANGES[change](rehearsed)
    assert calls.calls >= 3
    for at in range(calls.calls):
        for after in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                Failing(patch, WATCHED, at, after)
                with pytest.raises(RuntimeError, match="out of memory"):
                    CHANGES[change](whole)
            assert state_of(whole) == before, (at, after)
    CHANGES[change](whole)
    assert state_of(whole) == state_of(rehearsed)
    assert whole.index.num_labels == len(whole.label_texts.texts)


def test_failed_change_leaves_no_trace_in_a_saved_model(fresh, tmp_path):
    made = fresh("HNSW8")
    before = made.predict(TEXTS, 20)
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, [(faiss.IndexHNSWFlat, "add")], 0, after=True)
        with pytest.raises(RuntimeError, match="out of memory"):
            made.add_labels(["a red dog"])
    assert made.index.candidates.index.ntotal == 12, "a node is left, which no label has"
    made.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    for ours, theirs in zip(again.predict(TEXTS, 20), before, strict=True):
        assert [label.text for label in ours] == [label.text for label in theirs]
    made.add_labels(["a red dog"])
    assert "a red dog" in [label.text for label in made.predict("a red dog", 20)]


def test_ivf_lists_without_labels_are_scanned_saved_and_rebuilt(fresh, tmp_path, caplog):
    caplog.set_level("INFO", "hf_xmc")
    made = fresh("IVF8,SQ8")
    made.remove_labels([str(row) for row in range(4, 11)])
    assert caplog.text.count("All labels are scanned until there are more") == 1
    assert (made.index.built, made.index.factory) == ("Flat", "IVF8,SQ8")
    expected = made.predict(TEXTS, 20)
    assert [len(labels) for labels in expected] == [4, 4, 4]
    made.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert isinstance(again.index, FaissIndex)
    for ours, theirs in zip(again.predict(TEXTS, 20), expected, strict=True):
        assert [label.text for label in ours] == [label.text for label in theirs]
    made.add_labels(["boat one", "a red car"])
    assert made.index.built == "Flat"
    made.add_labels(["old dog", "old cat", "oak", "blue boat"])
    assert made.index.built == "IVF8,SQ8"
    assert made.index.num_labels == 10


@pytest.mark.parametrize("wrong", ["fewer", "narrow", "none"])
def test_index_of_other_labels_is_refused(fresh, wrong):
    made = fresh("exact")
    before, table = state_of(made), made.index.embeddings
    given = {"fewer": LabelIndex(table[1:]), "narrow": LabelIndex(table[:, 1:]), "none": table}[wrong]
    with pytest.raises(ValueError, match="`index` must be"):
        made.index = given
    assert state_of(made) == before


def test_index_of_other_embeddings_removes_the_calibration(fresh, queries):
    made = fresh("exact")
    made.calibrate(queries)
    made.index = FaissIndex(made.index.embeddings, "HNSW8")
    assert made.calibration is not None
    made.index = LabelIndex(made.index.embeddings + 1)
    assert made.calibration is None


KNOWN = [
    (embeddings, "encode_queries"),
    (own_votes, "equal_texts"),
    (own_votes, "equal_embeddings"),
    (model, "relevance_of"),
    (model, "choose_threshold"),
    (model, "unit_rows"),
    (Calibration, "__post_init__"),
    (Calibration, "__call__"),
    (LabelIndex, "search"),
    (memory, "unit_rows"),
    (memory, "evaluate_ranking"),
    (torch, "equal"),
]
USES = {
    "tune": lambda used, known: used.tune_memory(known, tolerance=0.1),
    "calibrate": lambda used, known: used.calibrate(known),
    "threshold": lambda used, known: used.threshold_for(known),
    "remember": lambda used, known: used.remember(known),
    "same index": lambda used, known: setattr(used, "index", FaissIndex(used.index.embeddings + 0, "SQ8")),
    "other index": lambda used, known: setattr(used, "index", LabelIndex(used.index.embeddings + 1)),
}


@pytest.mark.parametrize("use", USES)
def test_memory_and_calibration_are_unchanged_whichever_inner_call_fails(use, fresh, queries):
    used, known = fresh("exact"), queries.select([1, 3, 5])
    used.calibrate(queries)
    before = used.calibration, used.memory.settings, type(used.index), state_of(used)
    with pytest.MonkeyPatch.context() as patch:
        calls = Failing(patch, KNOWN)
        rehearsed = fresh("exact")
        rehearsed.calibrate(queries)
        start = calls.calls
        USES[use](rehearsed, known)
    count = calls.calls - start
    assert count
    for at in sorted({*range(min(count, 8)), *range(max(0, count - 3), count)}):
        for after in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                Failing(patch, KNOWN, at, after)
                with pytest.raises(RuntimeError, match="out of memory"):
                    USES[use](used, known)
            assert (used.calibration, used.memory.settings, type(used.index), state_of(used)) == before, (at, after)


def table(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_milvus_index_is_unchanged_whichever_inner_call_fails(keep, after, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xmc.search.milvus_index.SENT_AT_ONCE", 4)  # several messages, of which the last may fail
    rows, queries, new = table(60), table(5, 1), table(10, 2)
    changes = {
        "add": lambda made: made.add(new),
        "remove": lambda made: made.remove(range(0, 60, 3)),
        "replace": lambda made: made.replace(range(10), new),
    }
    made = MilvusIndex(rows, str(tmp_path / "labels.db"), keep=keep, refine=60)
    exact = LabelIndex(rows).search(queries, 3)
    monkeypatch.setattr(made, "_searches_exactly", lambda *_: False)
    watched = [(made.candidates.client, name) for name in ("insert", "delete", "alter_collection_properties")]
    for change in changes.values():
        for at in range(5):
            with pytest.MonkeyPatch.context() as patch:
                calls = Failing(patch, watched, at, after)
                failed = False
                try:
                    change(made)
                except RuntimeError:
                    failed = True
            assert failed == (calls.calls > at)
            if not failed:
                made.remove(range(made.num_labels))
                made.add(rows)
            found = made.search(queries, 3)
            np.testing.assert_array_equal(found.label_ids, exact.label_ids)
            np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5)
    made.close()
    if keep:
        again = MilvusIndex(rows, str(tmp_path / "labels.db"), keep=True)
        np.testing.assert_array_equal(again.search(queries, 3).label_ids, exact.label_ids)
        again.close()


def test_kept_collection_is_used_only_with_all_of_its_embeddings(tmp_path):
    path, rows, queries = str(tmp_path / "labels.db"), np.concatenate([table(60), table(5)]), table(5, 1)
    made = MilvusIndex(rows, path, keep=True)
    made.remove([0, 7, 62])
    made.replace([3, 4], table(2, 2))
    made.add(table(4, 3))
    left = made.embeddings.numpy().copy()
    made.close()
    other = left.copy()
    other[30] *= 1.5
    for wrong in (other, left[:-1], left[::-1].copy(), left.astype(np.float16), rows):
        with pytest.raises(ValueError, match=f"does not hold these {len(wrong)} embeddings: drop it"):
            MilvusIndex(wrong, path, keep=True)
    with pytest.raises(ValueError, match="was made with other settings"):
        MilvusIndex(left, path, keep=True, index_type="HNSW")
    for _ in range(2):
        again = MilvusIndex(left, path, keep=True, refine=60)
        again._searches_exactly = lambda *_: False
        np.testing.assert_array_equal(again.search(queries, 3).label_ids, LabelIndex(left).search(queries, 3).label_ids)
        again.remove([1])
        left = np.delete(left, 1, axis=0)
        again.close()


def test_vectors_left_by_a_killed_process_are_not_returned(tmp_path):
    path, rows, queries = str(tmp_path / "labels.db"), table(60), table(5, 1)
    made = MilvusIndex(rows, path, keep=True)
    made.candidates._insert(np.concatenate([1.01 * rows, rows[:20]]))  # killed before the collection was signed
    made.close()
    again = MilvusIndex(rows, path, keep=True)
    _, places = again.candidates.nearest(queries, 60, None)
    assert (np.sort(places) == np.arange(60)).all()
    again.close()


def test_collection_without_a_description_is_refused(tmp_path):
    path = str(tmp_path / "labels.db")
    MilvusIndex(table(9), path, keep=True).close()
    made = MilvusIndex(table(9), path, keep=True)
    made.candidates.client.delete("labels", ids=[4])
    made.close()
    with pytest.raises(ValueError, match="lacks some of these embeddings"):
        MilvusIndex(table(9), path, keep=True)
    made = MilvusIndex(table(9), path, "others", keep=True)
    made.candidates.client.drop_collection_properties("others", ["hf_xmc.made_of"])
    made.close()
    with pytest.raises(ValueError, match="does not say which embeddings it holds"):
        MilvusIndex(table(9), path, "others", keep=True)


@pytest.mark.parametrize("factory", ["HNSW8", "IVF6,SQ8"])
def test_faiss_tables_of_other_embeddings_are_refused(factory):
    rows = table(90)
    state = FaissIndex(rows, factory).state()
    other = rows.copy()
    other[50, 2] += 1
    with pytest.raises(ValueError, match="the tables belong to other embeddings"):
        FaissIndex.from_state(other, factory, state)
