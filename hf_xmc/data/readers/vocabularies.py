"""Read vocabulary files as tables of label texts with columns ``uid`` and ``text``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from hf_xmc.data.readers.delimited import read_csv_rows, suffix_of
from hf_xmc.data.readers.formats import read_lines
from hf_xmc.data.readers.skos import SYNTAXES, language_distance, read_skos_labels, suits_language
from hf_xmc.data.readers.tables import LABELS, read_table

Reader = Callable[[Path, Counter[str], str], pa.Table]
PREFIX = "label_"  # prefix of a column with labels in one language


def read_vocabulary(path: str | Path, load_report: Counter[str] | None = None, language: str = "en") -> pa.Table:
    """Return the labels in a file, with columns ``text`` and, if the file has them, ``uid``.

    * ``.txt``: one label name per line.
    * ``.tsv``: ``uid TAB text`` per line, and optionally a notation, as in Annif. A ``uid`` may be written as
    ``<...>``. * ``.csv``: columns ``uid`` and ``text``, or as in Annif ``uri`` and one column per language such as
    ``label_en``. * ``.jsonl`` or ``.parquet``: columns ``text`` and optionally ``uid``. * ``.ttl``, ``.rdf`` or
    ``.nt``: a thesaurus in SKOS, see :func:`hf_xmc.data.readers.skos.read_skos_labels`.

    All but ``.parquet`` may be gzipped, such as ``.tsv.gz``. Several rows of one ``uid`` are several texts of one
    label.

    Args:
        path: Path of the file.
        load_report: Counts of skipped or replaced entries, to which this function adds.
        language: Language of the texts, if the file has several.

    Raises:
        ValueError: if the file does not exist, has an unknown format, cannot be read, or has no text in ``language``.
        ModuleNotFoundError: if the file is SKOS and rdflib is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`vocabulary` must be an existing file, got {str(path)!r}.")
    report = Counter[str]() if load_report is None else load_report
    if is_vocabulary(path):
        return READERS[suffix_of(path)](path, report, language)
    raise ValueError(
        f"`vocabulary` must be a file in one of these formats: {', '.join(READERS)}, got {str(path)!r}. Or pass a list "
        "of names, or a dict from uid to name."
    )


def is_vocabulary(path: Path) -> bool:
    """Return whether a file name is that of a supported format."""
    return suffix_of(path) in READERS and not path.name.lower().endswith(".parquet.gz")


def bare_uri(uri: str) -> str:
    """Return a URI without the angle brackets around it.

    >>> bare_uri("<http://example.org/1>")
    'http://example.org/1'
    """
    return uri[1:-1].strip() if uri.startswith("<") and uri.endswith(">") else uri


def _read_names(path: Path, load_report: Counter[str], language: str) -> pa.Table:
    names = [line.strip() for line, _ in read_lines(path, load_report)]
    return pa.table({"text": pa.array([name for name in names if name], pa.string())})


def _read_columns(path: Path, load_report: Counter[str], language: str) -> pa.Table:
    table: pa.Table = read_table(path, LABELS, str(path), load_report).with_format("arrow")[:]
    return table


def _read_tsv(path: Path, load_report: Counter[str], language: str) -> pa.Table:
    uids, texts = [], []
    for number, (line, where) in enumerate(read_lines(path, load_report)):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if number == 0 and [field.lower() for field in fields[:2]] in (["uid", "text"], ["uri", "label"]):
            load_report[f"{path.name}: names of columns in the first line"] += 1
            continue
        if len(fields) not in (2, 3) or not bare_uri(fields[0]) or not fields[1]:
            raise ValueError(f"{where}: expected `uid TAB text`, and optionally a notation, got {line[:80]!r}.")
        if len(fields) == 3 and fields[2]:
            load_report[f"{path.name}: notations, not read"] += 1
        uids.append(bare_uri(fields[0]))
        texts.append(fields[1])
    return _table(uids, texts)


def _read_csv(path: Path, load_report: Counter[str], language: str) -> pa.Table:
    uids: list[str] = []
    texts: list[str] = []
    columns: list[str] | None = None
    key: str | None = None
    for row, where in read_csv_rows(path, load_report):
        if columns is None:
            key = next((name for name in ("uid", "uri") if name in row), None)
            columns = _text_columns(path, list(row), language)
            if key is None and columns != ["text"]:
                raise ValueError(f"{path}: there is no column uid or uri, only {', '.join(row)}.")
        found = next((column for column in columns if row[column].strip()), None)
        uid = bare_uri(row[key].strip()) if key else ""
        if key and not uid:
            raise ValueError(f"{where}: {key} is empty.")
        if found is None:
            load_report[f"{path.name}: labels without a text, left out"] += 1
            continue
        if found != "text" and not suits_language(found.removeprefix(PREFIX).lower(), language):
            load_report[f"{path.name}: labels in {found.removeprefix(PREFIX)}, because {language} is missing"] += 1
        if row.get("notation", "").strip():
            load_report[f"{path.name}: notations, not read"] += 1
        uids.append(uid)
        texts.append(row[found].strip())
    return _table(uids, texts) if key else pa.table({"text": pa.array(texts, pa.string())})


def _text_columns(path: Path, names: list[str], language: str) -> list[str]:
    """Return the columns of texts, the best for a language first."""
    if "text" in names:
        return ["text"]
    languages = {name.removeprefix(PREFIX).lower(): name for name in names if name.startswith(PREFIX)}
    if not languages:
        raise ValueError(f"{path}: there is no column text or label_en, only {', '.join(names)}.")
    if not any(suits_language(tag, language) for tag in languages):
        raise ValueError(f"{path}: `language` must be one of {', '.join(sorted(languages))}, got {language!r}.")
    return [languages[tag] for tag in sorted(languages, key=lambda tag: language_distance(tag, language))]


def _table(uids: list[str], texts: list[str]) -> pa.Table:
    return pa.table({"uid": pa.array(uids, pa.string()), "text": pa.array(texts, pa.string())})


READERS: dict[str, Reader] = {
    ".txt": _read_names,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_columns,
    ".parquet": _read_columns,
    **dict.fromkeys(SYNTAXES, read_skos_labels),
}
