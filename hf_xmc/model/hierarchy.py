"""Labels with parents: roll scores up to ancestors, and complete sets of labels with their ancestors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np

from hf_xmc.data.readers import skos
from hf_xmc.topk import TopK

logger = logging.getLogger(__name__)


class Hierarchy:
    """The broader labels of each label. A label may have several parents.

    Args:
        parents: The uids of the parents of each label, by its uid. Roots may be left out.

    Raises:
        ValueError: if a label is its own ancestor.

    >>> Hierarchy({"sloop": ["sailing boat"], "sailing boat": ["boat"]}).closure(["sloop"])
    ['boat', 'sailing boat', 'sloop']
    """

    def __init__(self, parents: Mapping[str, Iterable[str]]) -> None:
        self.parents: dict[str, list[str]] = {}
        for uid, above in parents.items():
            if isinstance(above, str):
                raise ValueError(f"the parents of {uid!r} must be a list of uids, got the string {above!r}.")
            self.parents[uid] = list(dict.fromkeys(above))
        try:
            order = list(TopologicalSorter(self.parents).static_order())  # parents before their children
        except CycleError as error:
            raise ValueError(f"a label cannot be its own ancestor: {' < '.join(map(repr, error.args[1]))}.") from None
        self._place = {uid: number for number, uid in enumerate(order)}
        self.ancestors: dict[str, list[str]] = {}  # of every label, the broadest first
        for uid in order:
            above = {ancestor for parent in self.parents.get(uid, []) for ancestor in self.ancestors[parent]}
            self.ancestors[uid] = sorted(above.union(self.parents.get(uid, [])), key=self._place.__getitem__)

    @classmethod
    def read(cls, path: str | Path) -> Hierarchy:
        """Read a hierarchy from a file.

        The file has one line ``uid TAB parent_uid`` for each parent of a label. Or it is a thesaurus in SKOS, as
        ``.ttl``, ``.rdf`` or ``.nt``, of which ``skos:broader`` and ``skos:narrower`` are read: see
        :mod:`hf_xmc.data.readers.skos`. Deprecated concepts are left out, and a log message of
        level INFO counts them.

        Raises:
            ValueError: if a line has another form or is not UTF-8 (the message has its number), a thesaurus cannot be
                read, or a label is its own ancestor.
            ModuleNotFoundError: if the file is SKOS and rdflib is not installed.
        """
        path = Path(path)
        if skos.is_skos(path):
            report = Counter[str]()
            hierarchy = cls(skos.read_skos_parents(path, report))
            for reason, number in report.items():
                logger.info("%s: %d", reason, number)
            return hierarchy
        parents: dict[str, list[str]] = {}
        for number, content in enumerate(path.read_bytes().split(b"\n"), start=1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}).") from None
            if not line.strip():
                continue
            uid, *above = line.rstrip("\r").split("\t")
            if len(above) != 1 or not uid or not above[0]:
                raise ValueError(f"{path}, line {number}: a line must be `uid TAB parent_uid`, got {line!r}.")
            parents.setdefault(uid, []).extend(above)
        return cls(parents)

    @property
    def uids(self) -> list[str]:
        """The uids of all labels, parents before their children."""
        return list(self.ancestors)

    def closure(self, uids: Iterable[str]) -> list[str]:
        """Return labels with all their ancestors, the broadest first.

        Raises:
            ValueError: if a label is not in the hierarchy.
        """
        wanted = list(uids)
        for uid in wanted:
            if uid not in self.ancestors:
                raise ValueError(f"uid {uid!r} is not in the hierarchy.")
        return sorted({*wanted, *(up for uid in wanted for up in self.ancestors[uid])}, key=self._place.__getitem__)

    def roll_up(self, found: TopK, k: int, rows: Mapping[str, int], hidden: np.ndarray | None = None) -> TopK:
        """Return the best ``k`` labels if each scores as the best of itself and all its descendants.

        Of equal scores the ancestor comes first. Any cut of the result therefore holds the ancestors of each of its
        labels. The result is exact if ``found`` has the best ``k``, because all risen scores come from them.

        Args:
            found: The best labels of each query.
            k: The number of labels to return.
            rows: The label id of each label that the model has, by uid. Other labels of the hierarchy pass scores on to
                their ancestors, and are not returned.
            hidden: ``(L,)``, whether a label may not be returned.
        """
        up = {row: [rows[above] for above in self.ancestors[uid] if above in rows] for uid, row in rows.items()}
        depth = {row: self._place[uid] for uid, row in rows.items()}
        best = TopK.empty(len(found.label_ids), k, found.scores.dtype)
        for number, (label_ids, scores) in enumerate(zip(found.label_ids.tolist(), found.scores, strict=True)):
            risen: dict[int, float] = {}
            for label, score in zip(label_ids, scores, strict=True):
                if label >= 0:
                    for row in (*up.get(label, []), label):
                        risen[row] = max(risen.get(row, score), score)
            kept = [row for row in risen if hidden is None or not hidden[row]]
            kept.sort(key=lambda row: (-risen[row], depth.get(row, len(depth)), row))
            best.label_ids[number, : len(kept[:k])] = kept[:k]
            best.scores[number, : len(kept[:k])] = [risen[row] for row in kept[:k]]
        return best
