"""Corpora of texts with label names, and their assembly into a data set."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_xmc.data.named import NamedRows, assemble_named
from hf_xmc.data.prepared import SPLITS, Parts
from hf_xmc.data.readers.formats import TextBuilder
from hf_xmc.data.vocabulary import UNKNOWN, Vocabulary


class Corpus:
    """Texts with the names or uids of their labels, collected while reading a file.

    Attributes:
        names: Texts of labels by name or uid, if the file has them.
        tokens: Whether labels are words without white space, in which ``_`` may replace a space.
    """

    def __init__(self, path: Path, *, tokens: bool = False) -> None:
        self.path = path
        self.names: dict[str, str] = {}
        self.tokens = tokens
        self._texts = TextBuilder()
        self._lines = array("q")
        self._offsets, self._codes = array("q", [0]), array("q")
        self._code_of: dict[str, int] = {}

    def append(self, text: str, labels: Iterable[str], line: int) -> None:
        """Add a text with its labels, from a line of the file."""
        self._texts.append(text)
        self._codes.extend(self._code_of.setdefault(label, len(self._code_of)) for label in labels)
        self._offsets.append(len(self._codes))
        self._lines.append(line)

    @property
    def labels(self) -> list[str]:
        """Return each label once, in the order of the first occurrence."""
        return list(self._code_of)

    def where(self, row: int) -> str:
        """Return the file and line of a row."""
        return f"{self.path}:{self._lines[row]}"

    def first_place(self, label: str) -> str:
        """Return the file and line of the first row with a label."""
        at = self._codes.index(self._code_of[label])
        return self.where(int(np.searchsorted(self._offsets, at, "right")) - 1)

    def rows(self, vocabulary: Vocabulary | None) -> NamedRows:
        """Return the rows. Labels that are tokens are spelled as in the vocabulary."""
        labels = self.labels
        if vocabulary is not None and self.tokens:
            spelled = [label.replace("_", " ") for label in labels]
            known = vocabulary.label_ids(labels), vocabulary.label_ids(spelled)
            labels = [
                other if one == UNKNOWN and two != UNKNOWN else label
                for label, other, one, two in zip(labels, spelled, *known, strict=True)
            ]
        flat = pa.array(labels, pa.string()).take(pa.array(np.array(self._codes, np.int64)))
        lists = pa.ListArray.from_arrays(pa.array(np.array(self._offsets), pa.int32()), flat)
        return NamedRows(self._texts.done(), pa.chunked_array([lists]), self.where)


def assemble_corpora(
    corpora: Mapping[str, Corpus],
    vocabulary: Vocabulary | None,
    load_report: Counter[str],
    unknown: str = "error",
) -> Parts:
    """Return the parts of a data set. Without a vocabulary, the labels are all that occur, train first.

    Args:
        corpora: The corpus of each split.
        vocabulary: All labels, or ``None``.
        load_report: Counts of corrections by the readers, to which this function adds.
        unknown: As in :func:`hf_xmc.data.named.assemble_named`.

    Raises:
        ValueError: if there is no vocabulary and a label has only a URI or a number instead of a text, or if
            :func:`hf_xmc.data.named.assemble_named` raises it.
    """
    given = vocabulary or _vocabulary_of([corpora[split] for split in SPLITS if split in corpora])
    rows = {split: corpus.rows(vocabulary) for split, corpus in corpora.items()}
    return assemble_named(rows, given, unknown=unknown, load_report=load_report)


def _vocabulary_of(corpora: list[Corpus]) -> Vocabulary | None:
    """Return the labels that occur, with their texts from the corpora."""
    names: dict[str, str] = {}
    for corpus in corpora:
        numbers = corpus.tokens and bool(corpus.labels) and all(label.isdecimal() for label in corpus.labels)
        for label in corpus.labels:
            if label not in corpus.names and (numbers or "://" in label):
                raise ValueError(
                    f"{corpus.first_place(label)}: label {label!r} is a {'number' if numbers else 'URI'}, and its text "
                    "is not known. Pass `vocabulary`, such as the path of a file with lines `uid TAB text`."
                )
            text = label.replace("_", " ").strip() if corpus.tokens else label
            names.setdefault(label, corpus.names.get(label) or text or label)
    return Vocabulary.of(names) if names else None
