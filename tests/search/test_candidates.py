"""An index of one's own, written as in the docstring of `Candidates`, and the public methods of every index."""

import inspect
from copy import copy

import numpy as np
import pytest
import torch
from helpers.tiny import LABELS

from hf_xmc import FaissIndex, LabelIndex, MilvusIndex, XMCModel
from hf_xmc.search.approximate import ApproximateIndex
from hf_xmc.search.candidates import Candidates, Change
from hf_xmc.search.grouped import GroupedIndex

RNG = np.random.default_rng(0)
TABLE, QUERIES = RNG.normal(size=(300, 16)).astype(np.float32), RNG.normal(size=(20, 16)).astype(np.float32)


class Signs(Candidates):
    """Compares the signs of random projections."""

    def __init__(self, bits=64):
        self.bits, self.requests = bits, []

    def build(self, vectors, embeddings):
        self.projection = np.random.default_rng(1).normal(size=(vectors.shape[1], self.bits)).astype(np.float32)
        self.codes = np.sign(vectors @ self.projection)

    @property
    def num_places(self):
        return len(self.codes)

    def nearest(self, queries, k, visible):
        self.requests.append(k)
        scores = np.sign(queries @ self.projection) @ self.codes.T
        if visible is not None:
            scores[:, ~visible] = -np.inf
        places = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, places, 1), places


class GrowingSigns(Signs):
    """Adds vectors without building again."""

    def update(self, change: Change):
        self.codes = np.concatenate([self.codes, np.sign(change.added_vectors() @ self.projection)])
        return True


@pytest.mark.parametrize("kind", [Signs, GrowingSigns])
def test_own_candidates_meet_the_contract_of_an_index(kind):
    candidates = kind()
    index = ApproximateIndex(TABLE, candidates, refine=12)
    index.add(2 * TABLE[:3])
    index.remove([5, 7])
    index.replace([0], TABLE[9:10])  # equal to label 7, which was label 9
    table = np.delete(np.concatenate([TABLE, 2 * TABLE[:3]]), [5, 7], axis=0)
    table[0] = TABLE[9]
    for choice in ({}, {"deny": [1, 2]}, {"exclude": np.array([[0, 4], [3, 0]])}):
        found, exact = index.search(QUERIES, 5, **choice), LabelIndex(table).search(QUERIES, 5, **choice)
        same = found.label_ids == exact.label_ids
        assert same.mean() > 0.5, choice
        np.testing.assert_allclose(found.scores[same], exact.scores[same], rtol=1e-5)
    assert candidates.requests[0] == 60
    assert index.search(TABLE[9:10], 2).label_ids.tolist() == [[0, 7]], "equal embeddings tie in the order of ids"
    assert index.num_labels == 301


def remove(model):
    model.remove_labels(["0", "70"])


def test_model_searches_with_own_candidates(encoder):
    model = XMCModel(encoder, [f"{one} {other}" for one in LABELS for other in LABELS])
    plain = copy(model)
    candidates = Signs(512)
    model.index = ApproximateIndex(model.index.embeddings, candidates, refine=20)
    for change in (lambda model: None, lambda model: model.add_labels(["a red dog"]), remove):
        change(model)
        change(plain)
        found, expected = ([[p.text for p in row] for row in m.predict(LABELS, 3)] for m in (model, plain))
        assert found == expected
    assert candidates.requests


def test_error_bound_makes_a_scan_exact():
    candidates = Signs()
    candidates.error = 1e9  # anything may be missing
    index = ApproximateIndex(TABLE, candidates, refine=1)
    np.testing.assert_array_equal(index.search(QUERIES, 4).label_ids, LabelIndex(TABLE).search(QUERIES, 4).label_ids)
    assert candidates.requests == [4, 16, 64, 256, 300]


def test_index_searches_exactly_beyond_the_maximum_of_candidates():
    candidates = Signs()
    candidates.max_candidates = 3
    index = ApproximateIndex(TABLE, candidates)
    index.search(QUERIES, 3)
    assert candidates.requests == [3]
    np.testing.assert_array_equal(index.search(QUERIES, 4).label_ids, LabelIndex(TABLE).search(QUERIES, 4).label_ids)
    assert candidates.requests == [3]


USES = {  # every public method and property, and a use that must work
    "add": lambda index: index.add(TABLE[:2] / 2),
    "remove": lambda index: index.remove([3]),
    "replace": lambda index: index.replace([3], TABLE[:1] / 2),
    "rearrange": lambda index: index.rearrange(np.append(np.arange(1, index.num_labels), -1), TABLE[:1] / 2),
    "search": lambda index: index.search(QUERIES, 3, exclude=np.array([[0, 1]]), allow=range(200), deny=[4]),
    "num_labels": lambda index: index.num_labels + 1,
    "embedding_dim": lambda index: index.embedding_dim + 1,
    "tune": lambda index: index.tune(QUERIES),
    "state": lambda index: index.state(),
    "from_state": lambda index: index.from_state(index.embeddings, index.factory, index.state()),
    "factory": lambda index: index.factory.lower(),
    "built": lambda index: index.built.lower(),
    "effort": lambda index: setattr(index, "effort", 32),
    "scans": lambda index: index.scans and None,
    "keep": lambda index: setattr(index, "keep", False),
    "close": lambda index: index.close(),
}


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: LabelIndex(TABLE),
        lambda folder: LabelIndex(torch.from_numpy(TABLE).half()),
        lambda folder: FaissIndex(TABLE, "HNSW8"),
        lambda folder: MilvusIndex(TABLE, f"{folder}/labels.db", keep=True),
        lambda folder: ApproximateIndex(TABLE, Signs()),
        lambda folder: GroupedIndex(LabelIndex(TABLE), np.append(np.arange(299), 298)),
    ],
    ids=["exact", "half", "faiss", "milvus", "own", "grouped"],
)
def test_every_public_method_of_an_index_works(build, tmp_path):
    index = build(tmp_path)
    public = {name for name, _ in inspect.getmembers(type(index)) if not name.startswith("_")}
    assert {"search", "num_labels"} <= public <= USES.keys()
    for name, use in USES.items():
        if name in public:
            use(index)


def test_grouped_index_has_no_method_that_changes_it():
    assert not {"add", "remove", "replace"} & set(dir(GroupedIndex))
