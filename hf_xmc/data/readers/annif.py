"""Document corpora of Annif: short texts in TSV, CSV and JSON lines, and folders of full texts.

Labels are the URIs of subjects, or the names of subjects without a URI.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_xmc.data.readers.corpora import Corpus
from hf_xmc.data.readers.delimited import read_csv_rows
from hf_xmc.data.readers.formats import object_of, objects_of, parse_json, read_lines
from hf_xmc.data.readers.vocabularies import bare_uri


def read_annif_tsv(path: Path, load_report: Counter[str], errors: str = "strict") -> Corpus:
    """Return a corpus of lines ``text TAB <uri> <uri>``. Blank lines are skipped.

    Raises:
        ValueError: if a line has no tab.
    """
    corpus = Corpus(path)
    for number, (line, where) in enumerate(read_lines(path, load_report, errors), start=1):
        text, tab, uris = line.partition("\t")
        if tab:
            corpus.append(text.strip(), map(bare_uri, uris.split()), number)
        elif line.strip():
            raise ValueError(f"{where}: expected `text TAB <uri> <uri>`, got no tab in {line[:80]!r}.")
    return corpus


def read_annif_csv(path: Path, load_report: Counter[str], errors: str = "strict") -> Corpus:
    """Return a corpus of the columns ``text`` and ``subject_uris``. Other columns are not read.

    Raises:
        ValueError: if a column is missing, or the file is not valid CSV.
    """
    corpus = Corpus(path)
    for row, where in read_csv_rows(path, load_report, errors):
        if missing := {"text", "subject_uris"} - row.keys():
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(row)}.")
        corpus.append(row["text"], map(bare_uri, row["subject_uris"].split()), int(where.rpartition(":")[2]))
    return corpus


def read_annif_jsonl(path: Path, load_report: Counter[str], errors: str = "strict") -> Corpus:
    """Return a corpus of JSON objects, one per line, with ``text`` and ``subjects``.

    A subject is an object with ``uri`` or ``label``, or both.

    Raises:
        ValueError: if an object has no text, or a subject has an invalid form.
    """
    corpus = Corpus(path)
    for record, where in objects_of(read_lines(path, load_report, errors)):
        _append_document(corpus, record, where, int(where.rpartition(":")[2]))
    return corpus


def read_annif_folder(folder: Path, load_report: Counter[str], errors: str = "strict") -> Corpus:
    """Return a corpus of full texts: one document per ``.txt`` file, with its subjects in ``.tsv`` or ``.key``.

    A ``.tsv`` file has lines ``<uri> TAB label``, a ``.key`` file has one label per line; the first is preferred if a
    document has both. A ``.json`` file is a document with its subjects. Documents without subjects are kept.

    Raises:
        ValueError: if a file of subjects has no document, a file is not UTF-8, or a document has an invalid form.
    """
    corpus = _FolderCorpus(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".tsv", ".key") and not path.with_suffix(".txt").exists():
            raise ValueError(f"{path} exists, but {path.with_suffix('.txt')} is missing.")
        if path.suffix == ".json":
            _append_document(corpus, object_of(parse_json(_content(path, errors), str(path)), str(path)), str(path), 0)
        elif path.suffix == ".txt":
            subjects = next((file for end in (".tsv", ".key") if (file := path.with_suffix(end)).exists()), None)
            if subjects is None:
                load_report["documents without a .tsv or .key file"] += 1
            labels = _subjects_in(subjects, corpus, load_report, errors) if subjects else []
            corpus.append_file(_content(path, errors), labels, subjects or path)
    return corpus


def is_annif_folder(folder: Path) -> bool:
    """Return whether a folder has a full text with its subjects."""
    return any(
        path.suffix == ".key" or (path.suffix == ".tsv" and path.with_suffix(".txt").exists())
        for path in folder.iterdir()
    )


class _FolderCorpus(Corpus):
    """A corpus with one file per row."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: list[Path] = []

    def append_file(self, text: str, labels: Iterable[str], path: Path) -> None:
        self.append(text, labels, len(self._files))
        self._files.append(path)

    def where(self, row: int) -> str:
        return str(self._files[row])


def _subjects_in(path: Path, corpus: Corpus, load_report: Counter[str], errors: str) -> list[str]:
    labels = []
    for line, where in read_lines(path, load_report, errors):
        fields = [field.strip() for field in line.split("\t")]
        if not any(fields):
            continue
        uri = bare_uri(fields[0])
        if path.suffix == ".tsv" and (uri != fields[0] or "://" in uri):
            if not uri:
                raise ValueError(f"{where}: the URI is empty; expected `<uri> TAB label`.")
            if len(fields) > 1 and fields[1]:
                corpus.names.setdefault(uri, fields[1])
            labels.append(uri)
        elif len(fields) == 1:
            labels.append(fields[0])
        else:
            expected = "`<uri> TAB label`" if path.suffix == ".tsv" else "one label"
            raise ValueError(f"{where}: expected {expected}, got {line[:80]!r}.")
    return labels


def _append_document(corpus: Corpus, record: dict[str, Any], where: str, line: int) -> None:
    text = record.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: text must be a string, got {text!r:.80}. Copy texts in `metadata` to `text`.")
    if "\0" in text:
        raise ValueError(f"{where}: text contains a NUL character.")
    subjects = record.get("subjects", [])
    if not isinstance(subjects, list):
        raise ValueError(f"{where}: subjects must be a list of objects with uri or label, got {subjects!r:.80}.")
    labels = [_subject(subject, corpus, where) for subject in subjects]
    if isinstance(corpus, _FolderCorpus):
        corpus.append_file(text, labels, Path(where))
    else:
        corpus.append(text, labels, line)


def _subject(subject: object, corpus: Corpus, where: str) -> str:
    """Return the URI of a subject, or its label if it has none."""
    given = subject if isinstance(subject, dict) else {}
    values = {key: value for key in ("uri", "label") if (value := given.get(key)) is not None}
    if not values or not all(isinstance(value, str) and value.strip() for value in values.values()):
        raise ValueError(f"{where}: a subject must be an object with uri or label, got {subject!r:.80}.")
    if "uri" not in values:
        return str(values["label"]).strip()
    uri = bare_uri(values["uri"].strip())
    if "label" in values:
        corpus.names.setdefault(uri, values["label"].strip())
    return uri


def _content(path: Path, errors: str) -> str:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        raise ValueError(f"{path}: the file contains a NUL character, so it is not text or is damaged.")
    try:
        return content.decode(errors=errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8. Convert the file, or pass errors='replace' to replace such bytes."
        ) from None
