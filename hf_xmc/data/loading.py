"""Load data sets in any layout, and check every value."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hf_xmc.data.carving import carve
from hf_xmc.data.dataset import XMCData
from hf_xmc.data.readers import repository
from hf_xmc.data.readers.corpus_files import find_corpora, load_corpora
from hf_xmc.data.readers.delimited import suffix_of
from hf_xmc.data.readers.layouts import check_one_layout, layouts_of, load_hub_layout, load_layout, load_tables
from hf_xmc.data.readers.user_data import holds_names, load_user_data
from hf_xmc.data.readers.user_files import SUFFIXES, TableChoice
from hf_xmc.data.vocabulary import Vocabulary


def path_of(data: str | Path) -> Path:
    """Return the path of a file or folder, which need not exist if it can be the name of a data set of the Hub.

    Raises:
        ValueError: if ``data`` is something else, or has the suffix of a table and does not exist.
    """
    if not isinstance(data, str | Path):
        raise ValueError(
            f"path must be a file, a folder, or a data set of the Hub, got {type(data).__name__}. For data in memory, "
            "write `XMCData.from_pandas(frame, text=..., labels=...)`, or `from_dataset` or `from_lists`."
        )
    path = Path(data)
    if path.exists() or suffix_of(path) not in SUFFIXES:
        return path
    files = sorted(file.name for file in path.parent.iterdir() if file.is_file()) if path.parent.is_dir() else []
    close = get_close_matches(path.name, files, 1)
    hint = f"Did you mean {str(path.parent / close[0])!r}?" if close else f"The present folder is {str(Path.cwd())!r}."
    raise ValueError(f"there is no file {str(path)!r}. {hint}")


def load_xmc(
    path: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    labels: str | Sequence[str] | None = None,
    separator: str | None = None,
    vocabulary: Any = None,
    language: str = "en",
    unknown: str = "error",
    encoding: str = "utf-8",
    carve_missing: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    errors: str = "strict",
) -> XMCData:
    """Load a data set in one of these forms.

    * A table of texts and label names or uids: a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, of which the
      first three may be gzipped, such as ``books.csv.gz``. Or a folder of such files named ``train`` and optionally
      ``validation``, ``test`` and ``labels``, the vocabulary. Missing splits are taken from train by
      :func:`hf_xmc.carve`.
    * An Annif corpus: a file of lines ``text TAB <uri> <uri>``, a ``.csv`` file with columns ``text`` and
      ``subject_uris``, a ``.jsonl`` file with ``text`` and ``subjects``, or a folder of ``.txt`` files with subjects in
      ``.tsv`` or ``.key`` files: ``load_xmc("corpus.tsv.gz", vocabulary="yso.ttl", language="fi")``.
    * fastText: a file of lines ``__label__name text``: ``load_xmc("train.txt")``.
    * AttentionXML and LightXML: a folder with ``train_raw_texts.txt`` or ``train_texts.txt``, and
      ``train_labels.txt``: ``load_xmc("EUR-Lex")``, with ``vocabulary="labels.tsv"`` if labels are numbers.

      A folder of these has files or folders named ``train`` and optionally ``validation`` and ``test``, and optionally
      a vocabulary ``labels``, such as ``labels.ttl``. In labels of the last two, ``_`` may replace a space.
    * The raw files of the Extreme Classification Repository: ``lbl.json(.gz)``, ``trn.json(.gz)``, ``tst.json(.gz)``,
      ``filter_labels_{train,test}.txt``. A text is ``title: content``.
    * The layout of the paper's code: ``raw/Y.txt``, ``raw/{trn,tst}_X.txt``, ``Y.{trn,tst}.npz``, the filter files.
    * PECOS: ``output-items.txt`` or ``Z.all.txt``, ``X.{trn,tst}.txt``, ``Y.{trn,tst}.npz``; or, for its text2text
      application, ``output-labels.txt``, ``training-data.txt`` and optionally ``test-data.txt``.
    * The Repository's label matrices with raw texts: ``Y.txt``, ``{trn,tst}_X.txt``, ``{trn,tst}_X_Y.txt``, and
      ``{trn,tst}_filter_labels.txt`` or the filter files.
    * A ``datasets`` repository of the Hub, or a local folder with the same layout: config ``default`` with ``text``,
    ``label_ids``
      and optionally ``label_scores``, config ``labels`` with ``text`` and optionally ``uid``, and optionally
      ``filter_pairs`` with ``row`` and ``label``.
    * A folder of ``labels``, ``train`` and optionally ``validation``, ``test`` as ``.jsonl`` or ``.parquet`` with the
      same columns.

      In both, several rows of ``labels`` with the same ``uid`` are texts of one label, the first preferred. Label ids
      then number the labels, not the rows, in the order in which each ``uid`` first occurs.
    * A data set written by :meth:`XMCData.save`.

    ``label_ids`` number the labels from 0. If each label has one row, they are row numbers of the label table. Other
    columns are not read.

    These are kept, and counted in ``load_report``: queries without labels, empty texts, repeated label texts, and
    texts beyond the first of their label.

    These are corrected and counted: a repeated label of a query (the larger score stays), a relevance of 0 (not a
    positive), a byte order mark, a carriage return at the end of a line, and a repeated filter pair.

    Anything else that is wrong, such as a ``uid`` shared by two labels, is an error with file and line. So are
    mismatched files, such as a matrix with more columns than labels; two files of one table, such as ``labels.jsonl``
    and ``labels.parquet``; two layouts in one folder; and ambiguous numbers, such as a numeric ``uid`` that is not the
    row number (:mod:`hf_xmc.data.numbering`).

    The arguments from ``text`` to ``carve_missing`` are for tables of texts and label names. A column ``label_scores``
    with lists of numbers makes their positives graded.

    Args:
        path: A file, a folder, or ``org/name`` of a data set of the Hub.
        text: Column of the text, by default ``text``. Several columns are joined in this order with a space, and empty
            cells are skipped.
        labels: Column of label names, as lists or as strings; or several columns that hold 0 or 1, each named as its
            label. By default the column ``labels``.
        separator: Separator of the names in a string, such as ``";"``; ``""`` if each string is one name.
        vocabulary: All labels, in a form that :meth:`hf_xmc.data.vocabulary.Vocabulary.of` accepts, such as the path of
            a file. By default the labels that occur.
        language: Language of the texts, if a vocabulary file has several. See
            :func:`hf_xmc.data.readers.vocabularies.read_vocabulary`.
        unknown: What to do with a label that is not in the vocabulary: ``"error"``, or ``"drop"``, which counts them.
        encoding: Encoding of CSV and TSV files, such as ``"latin-1"``. UTF-16 is recognized.
        carve_missing: Whether to take missing splits from train.
        revision, token, cache_dir, local_files_only, force_download: For a data set of the Hub, as in huggingface_hub.
            All tables are read from one commit. If the Hub does not answer, cached files are used.
        errors: ``"replace"`` replaces bytes that are not UTF-8, and counts them.

    Raises:
        ValueError: if the data set does not have one of these forms or is invalid, if a revision is given for a folder,
            or if a file from the Hub can be neither downloaded nor found in the cache.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"`errors` must be 'strict' or 'replace', got {errors!r}.")
    folder = path_of(path)
    choice = TableChoice(text, labels, separator, encoding, errors)
    given = {"text": text, "labels": labels, "separator": separator, "vocabulary": vocabulary}
    asked = [name for name, value in given.items() if value is not None]
    readers = {} if {"text", "labels", "separator"} & set(asked) else find_corpora(folder)
    if readers:
        others = [path for path, read in layouts_of(folder) if read is not load_tables]  # labels.jsonl is a vocabulary
        check_one_layout(folder, [Path(folder, next(iter(readers))), *others])
    is_table = not readers and (folder.is_file() or (folder.is_dir() and bool(asked or holds_names(folder))))
    if encoding != "utf-8" and not is_table:
        raise ValueError(
            f"`encoding` must be 'utf-8', got {encoding!r}, because {path} is neither a CSV nor a TSV table."
        )
    if unknown != "error" and not (readers or is_table):
        raise ValueError(
            f"`unknown` must be 'error', got {unknown!r}, because the labels of {path} are numbers, not names."
        )
    if readers or is_table:
        if revision is not None:
            raise ValueError(f"`revision` must be None for the local path {folder}, got {revision!r}.")
        if isinstance(vocabulary, str | Path):
            vocabulary = Vocabulary.read(vocabulary, language)
        if readers:
            parts = load_corpora(folder, readers, vocabulary, language, unknown, errors)
        else:
            parts = load_user_data(folder, choice, vocabulary, unknown, language)
        data = XMCData.of_parts(parts)
        return carve(data) if carve_missing else data
    if asked and not folder.exists():
        raise ValueError(
            f"the file {str(path)!r} does not exist, and `{asked[0]}` is not for data sets of the Hub. For those, "
            f"write `XMCData.from_dataset(datasets.load_dataset({str(path)!r}), text=..., labels=...)`."
        )
    if not folder.exists():
        name = path if isinstance(path, str) else path.as_posix()
        tables = repository.download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return load_hub_layout(name, tables, errors)
    if revision is not None:
        raise ValueError(f"`revision` must be None for the local folder {folder}, got {revision!r}.")
    return load_layout(folder, errors)
