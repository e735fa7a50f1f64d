"""Read corpora whose labels are words without white space: fastText, AttentionXML and LightXML."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from pathlib import Path

from hf_xmc.data.readers.corpora import Corpus
from hf_xmc.data.readers.formats import read_lines

MARK = "__label__"  # the default of fastText
TEXTS = "{}_raw_texts.txt", "{}_texts.txt"  # the second contains tokenized, lower-case words
LABELS = "{}_labels.txt"


def read_fasttext(path: Path, load_report: Counter[str], errors: str = "strict") -> Corpus:
    """Return a corpus of lines ``__label__name __label__name text``. Blank lines are skipped.

    As in fastText, a word that begins with ``__label__`` is a label at any position.

    Raises:
        ValueError: if a label has no name, or the file has no label.
    """
    corpus = Corpus(path, tokens=True)
    for number, (line, where) in enumerate(read_lines(path, load_report, errors), start=1):
        rest, labels = line.strip(), []
        while rest.startswith(MARK):  # the usual position, after which the text is unchanged
            label, *parts = rest.split(maxsplit=1)
            labels.append(label)
            rest = parts[0] if parts else ""
        if MARK in rest:
            words = rest.split()
            labels += [word for word in words if word.startswith(MARK)]
            rest = " ".join(word for word in words if not word.startswith(MARK))
        if MARK in labels:
            raise ValueError(f"{where}: a label without a name; expected `{MARK}name`.")
        if rest or labels:
            corpus.append(rest, [label.removeprefix(MARK) for label in labels], number)
    if not corpus.labels:
        raise ValueError(f"{path}: no label; expected lines `{MARK}name text`.")
    return corpus


def is_fasttext(line: str) -> bool:
    """Return whether a line has a label of fastText."""
    return any(word.startswith(MARK) for word in line.split())


def read_attention_xml(text_file: Path, label_file: Path, load_report: Counter[str], errors: str = "strict") -> Corpus:
    """Return a corpus of two files with one line per text: the texts, and their labels separated by spaces.

    Raises:
        ValueError: if the files have different numbers of lines.
    """
    corpus = Corpus(label_file, tokens=True)
    texts, labels = (read_lines(path, load_report, errors) for path in (text_file, label_file))
    for number, (text, names) in enumerate(zip_longest(texts, labels), start=1):
        if text is None or names is None:
            shorter, longer = (text_file, label_file) if text is None else (label_file, text_file)
            raise ValueError(
                f"{longer}:{number}: {shorter} has only {number - 1} lines, but both files must have the same number. "
                "Does a text contain a line break, or is a file truncated?"
            )
        corpus.append(text[0].strip(), names[0].split(), number)
    return corpus
