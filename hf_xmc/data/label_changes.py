"""Differences between the labels of a model and another version of their vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hf_xmc.data.labels import LabelTexts
from hf_xmc.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class LabelChanges:
    """Differences between two versions of a vocabulary; ``print`` shows counts and examples.

    Attributes:
        added: Uids of the labels that only the new version has.
        removed: Uids of the labels that only the old version has.
        renamed: Old and new preferred text, by uid.
        new_texts: New texts of a label other than the preferred one, by uid.
        removed_texts: Texts that a label no longer has, by uid, without the old preferred text of a renamed label.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    renamed: dict[str, tuple[str, str]] = field(default_factory=dict)
    new_texts: dict[str, list[str]] = field(default_factory=dict)
    removed_texts: dict[str, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.renamed, self.new_texts, self.removed_texts))

    def __str__(self) -> str:
        parts = {
            "added": self.added,
            "removed": self.removed,
            "renamed": [f"{uid}: {old!r} to {new!r}" for uid, (old, new) in self.renamed.items()],
            "new texts": [f"{uid}: {', '.join(texts)}" for uid, texts in self.new_texts.items()],
            "removed texts": [f"{uid}: {', '.join(texts)}" for uid, texts in self.removed_texts.items()],
        }
        lines = [
            f"{len(items)} {name}: {'; '.join(items[:3])}{'; ...' if len(items) > 3 else ''}"
            for name, items in parts.items()
            if items
        ]
        return "\n".join(lines) or "no changes"


class LabelUpdate(NamedTuple):
    """The labels of a model after an update.

    Attributes:
        changes: The differences.
        label_texts: The new labels. Remaining labels come first, in their old order.
        source: ``(T,)``, the row of each text in the old table; -1 for a text that is new for its label.
        kept: Label ids of the remaining labels.
    """

    changes: LabelChanges
    label_texts: LabelTexts
    source: np.ndarray
    kept: np.ndarray


def update_to(old: LabelTexts, vocabulary: Vocabulary) -> LabelUpdate:
    """Return the labels of a new version of a vocabulary, and the differences. Labels are matched by uid.

    A vocabulary of plain names matches labels by any of their texts if their uids are different. Such a label keeps its
    texts.

    Raises:
        ValueError: if no label remains, so that the vocabulary cannot be a version of these labels.
    """
    before, after = _texts_by_uid(old), _texts_by_uid_of(vocabulary)
    if not before.keys() & after.keys():
        after = _by_name(before, after)
    kept = [uid for uid in before if uid in after]
    if not kept:
        raise ValueError(
            f"`vocabulary` must have uids of the model such as {next(iter(before), None)!r}, got {len(after)} labels "
            f"such as {next(iter(after))!r}. Are these labels for this model?"
        )
    added = [uid for uid in after if uid not in before]
    changes = LabelChanges(added=added, removed=[uid for uid in before if uid not in after])
    rows = {(uid, text): row for row, (uid, text) in reversed(list(enumerate(_pairs(old))))}
    for uid in kept:
        one, other = before[uid], after[uid]
        if one[0] != other[0]:
            changes.renamed[uid] = one[0], other[0]
        if new := [text for text in other[1:] if text not in one]:
            changes.new_texts[uid] = new
        if gone := [text for text in one[1:] if text not in other]:
            changes.removed_texts[uid] = gone
    pairs = [(uid, text) for uid in (*kept, *added) for text in dict.fromkeys(after[uid])]
    columns = {"uid": pa.array([uid for uid, _ in pairs]), "text": pa.array([text for _, text in pairs])}
    if "seen" in old.labels.column_names or added:
        seen = dict(
            zip(before, old.labels["seen"] if "seen" in old.labels.column_names else [None] * len(before), strict=True)
        )
        columns["seen"] = pa.array([seen.get(uid, False) for uid, _ in pairs], pa.bool_())
    if "parent_texts" in old.labels.column_names:
        above = dict(zip(before, old.labels["parent_texts"], strict=True))
        columns["parent_texts"] = pa.array([above.get(uid) for uid, _ in pairs], pa.string())
    source = np.array([rows.get(pair, -1) for pair in pairs], dtype=np.int64)
    numbers = {uid: label for label, uid in enumerate(before)}
    return LabelUpdate(changes, LabelTexts(pa.table(columns)), source, np.array([numbers[uid] for uid in kept]))


def _pairs(labels: LabelTexts) -> list[tuple[str, str]]:
    return list(zip(labels.texts["uid"], labels.texts["text"], strict=True))


def _texts_by_uid(labels: LabelTexts) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for uid, text in _pairs(labels):
        texts.setdefault(uid, []).append(text)
    return texts


def _texts_by_uid_of(vocabulary: Vocabulary) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for uid, text in zip(vocabulary.labels["uid"], vocabulary.labels["text"], strict=True):
        texts.setdefault(uid, []).append(text)
    return texts


def _by_name(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return a vocabulary of plain names with the uids of the labels of these names."""
    if any(texts != [uid] for uid, texts in after.items()):
        return after
    owners: dict[str, list[str]] = {}
    for uid, texts in before.items():
        for text in dict.fromkeys(texts):
            owners.setdefault(text, []).append(uid)
    found: dict[str, list[str]] = {}
    for name in after:
        uids = owners.get(name, [name])
        if len(uids) > 1:
            raise ValueError(
                f"label name {name!r} belongs to two labels of the model, {uids[0]!r} and {uids[1]!r}. Pass a "
                "vocabulary with uids: `{uid: name, ...}`."
            )
        found[uids[0]] = before.get(uids[0], [name])
    return found
