"""Scores that rise to parents, and sets that hold the ancestors of their labels, on trees drawn by hand."""

import numpy as np
import pytest
from datasets import Dataset

from hf_xmc import Hierarchy, TopK, XMCModel

#            thing (0)
#        boat (1)   animal (2)
#   sloop (3)  raft (4)  dog (5);   a raft is an animal's too, and other (6) stands alone
PARENTS = {"boat": ["thing"], "animal": ["thing"], "sloop": ["boat"], "raft": ["boat", "animal"], "dog": ["animal"]}
NAMES = ["thing", "boat", "animal", "sloop", "raft", "dog", "other"]
ROWS = {name: row for row, name in enumerate(NAMES[:6])}


def risen(scores, k, hidden=None):
    order = np.argsort(-np.array(scores), kind="stable")
    found = TopK(order[None], np.array(scores, np.float32)[order][None])
    best = Hierarchy(PARENTS).roll_up(found, k, ROWS, hidden)
    return [(NAMES[row], round(float(score), 3)) for row, score in zip(*(part[0] for part in best), strict=True)]


def test_a_label_scores_as_the_best_of_itself_and_its_descendants():
    assert risen([0.1, 0.2, 0.3, 0.9, 0.0, 0.4, 0.8], 7) == [
        ("thing", 0.9), ("boat", 0.9), ("sloop", 0.9), ("other", 0.8), ("animal", 0.4), ("dog", 0.4), ("raft", 0.0),
    ]  # fmt: skip
    assert dict(risen([0.1, 0.2, 0.3, 0.0, 0.9, 0.4, 0.8], 7))["animal"] == 0.9


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], [*NAMES[3:], *NAMES[:3]]])
def test_roll_up_returns_the_ancestors_of_each_label_at_any_cut(order):
    rng = np.random.default_rng(0)
    hierarchy, rows = Hierarchy(PARENTS), {name: row for row, name in enumerate(order) if name != "other"}
    for _ in range(50):
        scores = rng.integers(0, 4, 7) / 4  # with ties
        ranked = np.argsort(-scores, kind="stable")
        for k in range(1, 8):
            found = hierarchy.roll_up(TopK(ranked[None], scores[ranked][None]), k, rows)
            kept = {order[row] for row in found.label_ids[0]}
            for name in kept - {"other"}:
                assert set(hierarchy.closure([name])) <= kept


def test_roll_up_of_the_best_k_is_exact():
    scores = [0.1, 0.25, 0.3, 0.9, 0.05, 0.4, 0.8]
    order = np.argsort(-np.array(scores))
    for k in range(1, 8):
        few = TopK(order[None, :k], np.array(scores)[order][None, :k])
        best = Hierarchy(PARENTS).roll_up(few, k, ROWS)
        assert [NAMES[row] for row in best.label_ids[0]] == [name for name, _ in risen(scores, k)]


def test_roll_up_passes_scores_through_hidden_labels():
    hidden = np.array([False, True, False, False, False, False, False])
    assert [name for name, _ in risen([0.1, 0.2, 0.3, 0.9, 0.0, 0.4, 0.8], 3, hidden)] == ["thing", "sloop", "other"]


def test_a_model_predicts_consistent_sets(encoder, tmp_path):
    labels = {"uid": NAMES, "text": ["colour", "boat", "animal", "sailing boat", "old", "dog", "oak tree"]}
    (tmp_path / "parents.tsv").write_text("".join(f"{a}\t{b}\n" for a, above in PARENTS.items() for b in above))
    hierarchy, model = Hierarchy.read(tmp_path / "parents.tsv"), XMCModel(encoder, Dataset.from_dict(labels))
    assert hierarchy.parents == PARENTS
    own = {p.uid: p.score for p in model.predict("a sailing dog", 7)}
    best = model.predict("a sailing dog", 7, hierarchy=hierarchy)
    below = {"thing": NAMES[:6], "boat": ["boat", "sloop", "raft"], "animal": ["animal", "raft", "dog"]}
    for label in best:
        assert label.score == pytest.approx(max(own[name] for name in below.get(label.uid, [label.uid])))
    assert [label.text for label in best][:1] == ["colour"]
    assert "boat" not in [p.uid for p in model.predict("a sailing dog", 7, hierarchy=hierarchy, deny=["boat"])]
    with pytest.raises(
        ValueError, match=r"must name labels of the model .*, got \['thing'\], and the model has \['0'\]"
    ):
        XMCModel(encoder, ["boat", "dog"]).predict("a", hierarchy=hierarchy)


def test_scores_rise_past_concepts_that_are_not_labels_of_the_model(encoder):
    labels = {"uid": ["thing", "sloop", "other"], "text": ["colour", "sailing boat", "oak tree"]}
    model, hierarchy = XMCModel(encoder, Dataset.from_dict(labels)), Hierarchy(PARENTS)
    own = {p.uid: p.score for p in model.predict("a sailing boat", 3)}
    best = model.predict("a sailing boat", 3, hierarchy=hierarchy)
    assert [(p.uid, p.score) for p in best[:2]] == [("thing", own["sloop"]), ("sloop", own["sloop"])]
    assert own["thing"] < own["sloop"]


def test_bad_hierarchies_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be its own ancestor: '[abc]' < '[abc]' < '[abc]' < '[abc]'"):
        Hierarchy({"a": ["b"], "b": ["c"], "c": ["a"]})
    with pytest.raises(ValueError, match="uid 'x' is not in the hierarchy"):
        Hierarchy({"a": ["b"]}).closure(["x"])
    with pytest.raises(ValueError, match="the parents of 'a' must be a list of uids, got the string 'bc'"):
        Hierarchy({"a": "bc"})
    (tmp_path / "parents.tsv").write_text("a\tb\nc d\n")
    with pytest.raises(ValueError, match="line 2: a line must be `uid TAB parent_uid`, got 'c d'"):
        Hierarchy.read(tmp_path / "parents.tsv")
    (tmp_path / "parents.tsv").write_bytes(b"a\tb\nb\tc\xff\n")
    with pytest.raises(ValueError, match=r"parents.tsv, line 2: not UTF-8 \(invalid start byte\)"):
        Hierarchy.read(tmp_path / "parents.tsv")


def test_read_strips_byte_order_mark_and_carriage_returns(tmp_path):
    (tmp_path / "parents.tsv").write_bytes(b"\xef\xbb\xbfsloop\tboat\r\n\r\nboat\tthing\r\n")
    assert Hierarchy.read(tmp_path / "parents.tsv").parents == {"sloop": ["boat"], "boat": ["thing"]}
