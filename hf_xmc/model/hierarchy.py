"""Labels with parents: scores that rise to them, and sets of labels that hold the ancestors of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np

from hf_xmc.topk import TopK


class Hierarchy:
    """The broader labels of each label. A label may have several parents.

    Args:
        parents: by label id, the ids of its parents; roots may be left out.

    Raises:
        ValueError: if a label is an ancestor of itself.

    >>> Hierarchy({"sloop": ["sailing boat"], "sailing boat": ["boat"]}).closure(["sloop"])
    ['boat', 'sailing boat', 'sloop']
    """

    def __init__(self, parents: Mapping[str, Iterable[str]]) -> None:
        self.parents: dict[str, list[str]] = {}
        for label, above in parents.items():
            if isinstance(above, str):
                raise ValueError(f"parents of {label!r}: expected a list of label ids, got the one text {above!r}.")
            self.parents[label] = list(dict.fromkeys(above))
        try:
            order = list(TopologicalSorter(self.parents).static_order())  # parents before their children
        except CycleError as error:
            raise ValueError(f"a label cannot be its own ancestor: {' < '.join(map(repr, error.args[1]))}.") from None
        self.ancestors: dict[str, list[str]] = {}  # of every label, those further up first
        place = {label: number for number, label in enumerate(order)}
        for label in order:
            above = {ancestor for parent in self.parents.get(label, []) for ancestor in self.ancestors[parent]}
            self.ancestors[label] = sorted(above.union(self.parents.get(label, [])), key=place.__getitem__)
        self._place = place

    @classmethod
    def read(cls, path: str | Path) -> Hierarchy:
        """A file of lines ``label_id TAB parent_id``, one for each parent of a label.

        Raises:
            ValueError: if a line has another form or is not UTF-8 (the message has its number), or a label is an
                ancestor of itself.
        """
        parents: dict[str, list[str]] = {}
        for number, content in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}).") from None
            if not line.strip():
                continue
            label, *above = line.rstrip("\r").split("\t")
            if len(above) != 1 or not label or not above[0]:
                raise ValueError(f"{path}, line {number}: expected `label_id TAB parent_id`, got {line!r}.")
            parents.setdefault(label, []).extend(above)
        return cls(parents)

    @property
    def label_ids(self) -> list[str]:
        """All labels that are named, parents before their children."""
        return list(self.ancestors)

    def closure(self, label_ids: Iterable[str]) -> list[str]:
        """These labels and all their ancestors, those further up first: a consistent set.

        Raises:
            ValueError: if a label is not in the hierarchy.
        """
        wanted = list(label_ids)
        for label in wanted:
            if label not in self.ancestors:
                raise ValueError(f"label_id {label!r} is not in the hierarchy.")
        return sorted({*wanted, *(up for label in wanted for up in self.ancestors[label])}, key=self._place.__getitem__)

    def roll_up(self, found: TopK, k: int, rows: Mapping[str, int], hidden: np.ndarray | None = None) -> TopK:
        """The best ``k`` where a label scores as the best of itself and all its descendants.

        Of equal scores the ancestor comes first, so that whatever is cut off behind leaves a consistent set: with each
        label its ancestors. Exact where ``found`` has the best ``k``: what rises comes from them.

        Args:
            found: the best labels of each query.
            rows: the row of every label of the hierarchy.
            hidden: ``(L,)``, labels that are not to come up.
        """
        up = {row: [rows[above] for above in self.ancestors[label]] for label, row in rows.items()}
        depth = {row: self._place[label] for label, row in rows.items()}
        best = TopK.empty(len(found.label_ids), k, found.scores.dtype)
        for number, (label_ids, scores) in enumerate(zip(found.label_ids.tolist(), found.scores, strict=True)):
            risen: dict[int, float] = {}
            for label, score in zip(label_ids, scores, strict=True):
                if label >= 0:
                    for row in (*up.get(label, []), label):  # the first score is the best, and stays
                        risen.setdefault(row, score)
            kept = [row for row in risen if hidden is None or not hidden[row]]
            kept.sort(key=lambda row: (-risen[row], depth.get(row, len(depth)), row))
            best.label_ids[number, : len(kept[:k])] = kept[:k]
            best.scores[number, : len(kept[:k])] = [risen[row] for row in kept[:k]]
        return best
