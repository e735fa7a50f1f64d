"""Detect corpora of Annif, fastText, AttentionXML and LightXML by file names and first lines."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_xmc.data.prepared import SPLITS, Parts
from hf_xmc.data.readers.annif import (
    is_annif_folder,
    read_annif_csv,
    read_annif_folder,
    read_annif_jsonl,
    read_annif_tsv,
)
from hf_xmc.data.readers.corpora import Corpus, assemble_corpora
from hf_xmc.data.readers.delimited import suffix_of
from hf_xmc.data.readers.formats import read_lines
from hf_xmc.data.readers.label_tokens import LABELS, TEXTS, is_fasttext, read_attention_xml, read_fasttext
from hf_xmc.data.readers.vocabularies import READERS
from hf_xmc.data.vocabulary import Vocabulary

Reader = Callable[[Counter[str], str], Corpus]
SUFFIXES = (".tsv", ".csv", ".jsonl", ".txt")


def find_corpora(path: Path) -> dict[str, Reader]:
    """Return a reader for each split in a file or folder; empty if it is not a corpus of these tools.

    * A file is the training split: ``text TAB <uri>``, ``__label__name text``, CSV with a column ``subject_uris``, or
      JSON lines with ``subjects``.
    * A folder has such files named ``train`` and optionally ``validation`` and ``test``, such as ``train.tsv.gz``; or
      folders of these names with full texts and their subjects; or it is such a folder itself; or it has
      ``train_labels.txt`` and ``train_raw_texts.txt`` or ``train_texts.txt``.

    Raises:
        ValueError: if a file of a layout is missing, or if a split has two files.
    """
    if path.is_file():
        reader = _reader_of(path)
        return {"train": reader} if reader else {}
    if not path.is_dir():
        return {}
    for found in (_split_files(path), _attention_xml(path), _full_texts(path)):
        if found:
            if "train" not in found:
                raise ValueError(f"{path} has the splits {', '.join(found)}, but train is missing.")
            return found
    return {}


def load_corpora(
    path: Path,
    readers: dict[str, Reader],
    vocabulary: Any = None,
    language: str = "en",
    unknown: str = "error",
    errors: str = "strict",
) -> Parts:
    """Return the parts of a data set that :func:`find_corpora` found.

    A file ``labels`` in the folder, such as ``labels.ttl``, is the vocabulary, unless one is given.

    Raises:
        ValueError: if a file cannot be read, or a label is not in the vocabulary. The message names file and line.
    """
    load_report: Counter[str] = Counter()
    files = [file for end in READERS for name in (f"labels{end}", f"labels{end}.gz") if (file := path / name).exists()]
    if vocabulary is None and path.is_dir() and files:
        if len(files) > 1:
            raise ValueError(f"{files[0]} and {files[1]} are both vocabularies. Remove one, or pass `vocabulary`.")
        vocabulary = Vocabulary.read(files[0], language)
    labels = None if vocabulary is None else Vocabulary.of(vocabulary)  # before the corpora, which take longer to read
    corpora = {split: read(load_report, errors) for split, read in readers.items()}
    return assemble_corpora(corpora, labels, load_report, unknown)


def _split_files(folder: Path) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    for split in SPLITS:
        names = [f"{split}{suffix}{end}" for suffix in SUFFIXES for end in ("", ".gz")]
        files = [path for name in names if (path := folder / name).exists()]
        found = [(path, reader) for path in files if (reader := _reader_of(path))]
        if found and len(files) > 1:
            raise ValueError(f"{files[0]} and {files[1]} are both the split {split}. Remove one of them.")
        if found:
            readers[split] = found[0][1]
        elif readers and files:
            raise ValueError(f"{files[0]} must have the format of the split {next(iter(readers))}.")
    return readers


def _attention_xml(folder: Path) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    for split in SPLITS:
        labels = folder / LABELS.format(split)
        texts = [path for name in TEXTS if (path := folder / name.format(split)).exists()]
        if labels.exists() and not texts:
            names = " or ".join(name.format(split) for name in TEXTS)
            raise ValueError(f"{labels} exists, but {names} is missing.")
        if texts and not labels.exists():
            raise ValueError(f"{texts[0]} exists, but {labels} is missing.")
        if texts:
            readers[split] = partial(read_attention_xml, texts[0], labels)
    return readers


def _full_texts(folder: Path) -> dict[str, Reader]:
    folders = {split: part for split in SPLITS if (part := folder / split).is_dir() and is_annif_folder(part)}
    if not folders and is_annif_folder(folder):
        folders = {"train": folder}
    return {split: partial(read_annif_folder, part) for split, part in folders.items()}


def _reader_of(path: Path) -> Reader | None:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return None
    first = _first_line(path)
    if suffix == ".csv":
        columns = {cell.strip().strip('"') for cell in re.split("[,;\t]", first)}
        return partial(read_annif_csv, path) if "subject_uris" in columns else None
    if suffix == ".jsonl":
        return partial(read_annif_jsonl, path) if _has_subjects(first) else None
    if suffix == ".tsv":
        words = first.partition("\t")[2].split()
        uris = bool(words) and all(word.startswith(("<", "http://", "https://")) for word in words)
        return partial(read_annif_tsv, path) if uris else None
    return partial(read_fasttext, path) if is_fasttext(first) else None


def _has_subjects(line: str) -> bool:
    """Return whether a line is a JSON object with a list of subject objects, as in Annif."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    subjects = record.get("subjects") if isinstance(record, dict) else None
    return isinstance(subjects, list) and all(isinstance(subject, dict) for subject in subjects)


def _first_line(path: Path) -> str:
    """Return the first line that is not blank, or an empty string if the file is not text."""
    try:
        for line, _ in read_lines(path, Counter(), "replace"):
            if line.strip():
                return line
    except (ValueError, gzip.BadGzipFile):  # the reader of the file reports them
        pass
    return ""
