"""Loading a data set, in whichever layout it comes, with everything in it checked."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_xmc.data import formats, prepared, repository
from hf_xmc.data.assembly import assemble, count, label_table
from hf_xmc.data.columns import ragged, texts_of
from hf_xmc.data.dataset import XMCData
from hf_xmc.data.formats import Rows
from hf_xmc.data.labels import count_labels
from hf_xmc.data.numbering import check_filter_pairs, refuse_other_numbers, refuse_repeated
from hf_xmc.data.prepared import PREPARED, SPLITS
from hf_xmc.data.tables import LABELS, PAIRS, QUERIES, read_config, read_table

logger = logging.getLogger(__name__)


def load_xmc(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    errors: str = "strict",
) -> XMCData:
    """Load a data set, in whichever of these forms it comes.

    * The raw files of the Extreme Classification Repository: ``lbl.json(.gz)``, ``trn.json(.gz)``, ``tst.json(.gz)``,
      ``filter_labels_{train,test}.txt``. A text is ``title: content``.
    * The layout of the paper's code: ``raw/Y.txt``, ``raw/{trn,tst}_X.txt``, ``Y.{trn,tst}.npz``, the filter files.
    * A ``datasets`` repository of the Hub, or a local folder like one: config ``default`` with ``text``, ``label_ids``
      and optionally ``label_scores``, config ``labels`` with ``text`` and optionally ``label_id``, and optionally
      ``filter_pairs`` with ``row`` and ``label``.
    * A folder of ``labels``, ``train`` and optionally ``validation``, ``test`` as ``.jsonl`` or ``.parquet`` with the
      same columns.

      In both, several rows of ``labels`` with one ``label_id`` are texts of one label, the first preferred. Label ids
      are then numbers of labels, not of rows: they count in the order in which each ``label_id`` first occurs.
    * What :meth:`XMCData.save` wrote.

    ``label_ids`` are numbers of labels, counted from 0: row numbers of the label table if each label has one row.
    Columns that are not named here are not read.

    What is kept as it is, and counted in ``notes``: queries without labels, empty texts, label texts that occur twice,
    texts beyond the first of their label.
    What is mended and counted: a label named twice for a query (the larger score stays), a relevance of 0 (not a
    positive), a byte order mark, a carriage return at the end of a line, a filter pair named twice. Everything else
    that is wrong, such as a ``uid`` that two labels have, is an error with file and line. So are files that do not
    belong together, such as a matrix with more columns than there are labels; two files of one table, such as
    ``labels.jsonl`` and ``labels.parquet``; two layouts in one folder; and numbers whose meaning would be a guess, such
    as a numeric ``label_id`` that is not the row number (:mod:`hf_xmc.data.numbering`).

    Args:
        path: A folder, or ``org/name`` of a data set of the Hub.
        revision, token, cache_dir, local_files_only, force_download: For a data set of the Hub, as in huggingface_hub.
            All tables are read from one commit. If the Hub does not answer, what is cached is used.
        errors: ``"replace"`` replaces bytes that are not UTF-8, and counts them.

    Raises:
        ValueError: if the data set is not one of these or anything in it is wrong, if a revision is given for a folder,
            or if a file of the Hub can neither be downloaded nor be found in the cache.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors is 'strict' or 'replace', got {errors!r}.")
    folder = Path(path)
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
        return _load_hub_layout(name, tables, errors)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder it is in.")
    if revision is not None:
        raise ValueError(f"revision must be None for a folder, got {revision!r}: {folder} has one version.")
    found = [(_only(folder, names), read) for names, read in LAYOUTS]
    layouts = [(path, read) for path, read in found if path is not None]
    if len(layouts) > 1:
        (one, _), (other, _), *_ = layouts
        raise ValueError(
            f"{folder} holds {one.relative_to(folder)} and {other.relative_to(folder)}, which are of two layouts. Are "
            "they two data sets? Give each a folder of its own."
        )
    for _, read in layouts:
        return read(folder, errors)
    if (folder / "README.md").exists():
        return _load_hub_layout(str(folder), folder, errors)
    raise ValueError(
        f"{folder} holds {sorted(p.name for p in folder.iterdir())[:20]}, which is no layout known here. Expected one "
        "of: lbl.json(.gz) and trn.json(.gz); raw/Y.txt, raw/trn_X.txt and Y.trn.npz; labels.jsonl and train.jsonl "
        f"(or .parquet); a README.md with the configs `default` and `labels`; {PREPARED}."
    )


def _load_raw(folder: Path, errors: str) -> XMCData:
    notes: Counter[str] = Counter()
    label_file, train_file, test_file = (_only(folder, _json_names(name)) for name in ("lbl", "trn", "tst"))
    if label_file is None or train_file is None:
        raise ValueError(f"{folder} has lbl.json(.gz) but no trn.json(.gz).")
    texts, ids = formats.read_json_labels(label_file, notes, errors)
    labels = label_table(texts, ids, str(folder), notes)
    refuse_repeated(labels, lambda row: f"{label_file}:{row + 1}")
    splits = {"train": formats.read_json_rows(train_file, notes, errors)}
    if test_file:
        splits["test"] = formats.read_json_rows(test_file, notes, errors)
    return assemble(labels, splits, _text_filters(folder, splits, len(labels), notes), notes)


def _load_reference(folder: Path, errors: str) -> XMCData:
    notes: Counter[str] = Counter()
    label_file = folder / "raw" / "Y.txt"
    texts = formats.read_texts(label_file, notes, errors)
    labels = label_table(texts, range(len(texts)), str(folder), notes)
    splits = {}
    for name, short in (("train", "trn"), ("test", "tst")):
        text_file, relevance = folder / "raw" / f"{short}_X.txt", folder / f"Y.{short}.npz"
        for one, other in ((text_file, relevance), (relevance, text_file)):
            if one.exists() and not other.exists():
                raise ValueError(f"{one} is there, but {other} is not.")
        if text_file.exists():
            splits[name] = formats.read_text_rows(text_file, relevance, label_file, len(texts), notes, errors)
    if "train" not in splits:
        raise ValueError(f"{folder} has raw/Y.txt but no raw/trn_X.txt.")
    return assemble(labels, splits, _text_filters(folder, splits, len(labels), notes), notes)


def _load_tables(folder: Path, errors: str) -> XMCData:
    files = {name: path for name in ("labels", *SPLITS) if (path := _only(folder, _table_names(name)))}
    if "train" not in files and (folder / "README.md").exists():
        return _load_hub_layout(str(folder), folder, errors)  # a repository whose labels stand at its root
    if "train" not in files:
        raise ValueError(f"{folder} has a labels table but no train.jsonl or train.parquet.")
    notes: Counter[str] = Counter()
    loaded = {
        name: read_table(path, LABELS if name == "labels" else QUERIES, f"{folder}, {name}", notes, errors)
        for name, path in files.items()
    }
    pairs = _only(folder, _table_names("filter_pairs"))
    filters = {"test": read_table(pairs, PAIRS, f"{folder}, filter_pairs", notes, errors)} if pairs else {}
    if others := sorted(path.name for path in set(folder.glob("*.*")) - {*files.values(), pairs} if _is_table(path)):
        logger.warning(
            "%s: not read: %s. The tables are labels, %s and filter_pairs, each as .jsonl or .parquet.",
            folder,
            ", ".join(others),
            ", ".join(SPLITS),
        )
    return _from_datasets(str(folder), loaded.pop("labels"), loaded, filters, notes)


def _load_hub_layout(name: str, folder: Path, errors: str) -> XMCData:
    """Read a folder that is laid out like a repository of the Hub; messages call it ``name``."""
    configs = repository.configs_of(folder, name)
    if not {"default", "labels"} <= set(configs):
        raise ValueError(f"{name} has the configs {list(configs)}; expected `default` (queries) and `labels`.")
    notes: Counter[str] = Counter()
    read = partial(read_config, name, folder, notes=notes, errors=errors)
    labels = read("labels", LABELS)
    if len(labels) != 1:
        raise ValueError(f"{name}, labels: expected one split, got {', '.join(labels)}: which one holds the labels?")
    splits = read("default", QUERIES)
    filters = read("filter_pairs", PAIRS) if "filter_pairs" in configs else {}
    return _from_datasets(name, next(iter(labels.values())), splits, filters, notes)


def _from_datasets(
    name: str,
    labels: Dataset,
    splits: dict[str, Dataset],
    filters: dict[str, Dataset],
    notes: Counter[str],
) -> XMCData:
    ids: Iterable[object] = range(len(labels))
    column: pa.ChunkedArray | None = None
    if "label_id" in labels.column_names:
        column = labels.with_format("arrow").select_columns("label_id")[:]["label_id"]
        if column.null_count:
            raise ValueError(f"{name}, labels, row {column.is_null().index(True).as_py()}: no label_id.")
        ids = column.to_pylist()
    where = f"{name}, labels, row "
    named = label_table(texts_of(labels, where), ids, name, notes)
    rows: dict[str, Rows] = {}
    for split, dataset in splits.items():
        if split not in SPLITS:
            raise ValueError(f"{name} has a split {split!r}; expected {', '.join(SPLITS)}.")
        where = f"{name}, {split}, row "
        offsets, label_ids, scores = ragged(dataset, where)
        rows[split] = Rows(texts_of(dataset, where), offsets, label_ids, scores, (where + "{}").format)
    if "train" not in rows:
        raise ValueError(f"{name} has no split train; it has {', '.join(rows)}.")
    if column is not None:
        used = np.concatenate([split.label_ids for split in rows.values()])
        refuse_other_numbers(column, used, f"{name}, labels")
    pairs = {}
    for split, dataset in filters.items():
        table, where = dataset.with_format("arrow")[:], f"{name}, filter_pairs of {split}"
        if not all(pa.types.is_integer(column.type) and not column.null_count for column in table.columns):
            raise ValueError(f"{where}: expected whole numbers, row and label, and no gaps.")
        given = np.stack([np.asarray(column, dtype=np.int64) for column in table.columns], axis=1)
        check_filter_pairs(given, len(rows[split].texts) if split in rows else 0, count_labels(named), where)
        pairs[split] = np.unique(given, axis=0)
        count(notes, f"filter_pairs of {split}: pairs named again", len(given) - len(pairs[split]))
    return assemble(named, rows, pairs, notes)


def _load_prepared(folder: Path, errors: str) -> XMCData:
    parts = prepared.read(folder)
    try:
        return XMCData(**parts.tables, filter_pairs=parts.filter_pairs, notes=parts.notes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _text_filters(folder: Path, splits: dict[str, Rows], num_labels: int, notes: Counter[str]) -> dict[str, np.ndarray]:
    """Read the files of filter pairs next to the texts. A missing split has no rows."""
    return {
        name: formats.read_filter_pairs(path, len(splits[name].texts) if name in splits else 0, num_labels, notes)
        for name in SPLITS
        if (path := folder / f"filter_labels_{name}.txt").exists()
    }


def _only(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the file of a folder that has one of these names, if there is one.

    Raises:
        ValueError: if there are two, which may differ.
    """
    found = [path for name in names if (path := folder / name).exists()]
    if len(found) > 1:
        raise ValueError(
            f"{found[0]} and {found[1]} name the same table, and only one of them would be read. Remove the one that "
            "is not meant."
        )
    return found[0] if found else None


def _json_names(name: str) -> tuple[str, ...]:
    return f"{name}.json.gz", f"{name}.json"


def _is_table(path: Path) -> bool:
    """Return whether a file looks like a table of a data set, though it may have a name that is not read."""
    return path.suffix in (".jsonl", ".parquet") or path.name.startswith(("filter_", *(f"{name}." for name in SPLITS)))


def _table_names(name: str) -> tuple[str, ...]:
    return f"{name}.jsonl", f"{name}.parquet"


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Path, str], XMCData]], ...] = (  # each has one of these files
    ((PREPARED,), _load_prepared),
    (_json_names("lbl"), _load_raw),
    (("raw/Y.txt",), _load_reference),
    (_table_names("labels"), _load_tables),
)
