"""Layouts of data sets that refer to labels by number, and their readers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_xmc.data import prepared
from hf_xmc.data.assembly import assemble, count, label_table
from hf_xmc.data.columns import ragged, texts_of
from hf_xmc.data.dataset import XMCData
from hf_xmc.data.labels import count_labels
from hf_xmc.data.named import NamedRows, assemble_named
from hf_xmc.data.numbering import check_filter_pairs, check_numbering, check_unique_uids
from hf_xmc.data.prepared import PREPARED, SPLITS
from hf_xmc.data.readers import formats, repository, text2text
from hf_xmc.data.readers.formats import Rows
from hf_xmc.data.readers.matrices import PECOS, REFERENCE, REPOSITORY, only, text_filters
from hf_xmc.data.readers.tables import LABELS, NAMED_QUERIES, PAIRS, QUERIES, read_config, read_table
from hf_xmc.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def load_layout(folder: Path, errors: str) -> XMCData:
    """Load the data set in a folder that has one of the layouts.

    Raises:
        ValueError: if the folder does not have exactly one layout, or its content is invalid.
    """
    layouts = layouts_of(folder)
    check_one_layout(folder, [path for path, _ in layouts])
    for _, read in layouts:
        return read(folder, errors)
    if (folder / "README.md").exists():
        return load_hub_layout(str(folder), folder, errors)
    for layout in (PECOS, REPOSITORY):
        if (folder / layout.relevance.format("trn")).exists():
            return layout.load(folder, errors)  # its error names the missing file
    raise ValueError(
        f"{folder} holds {sorted(p.name for p in folder.iterdir())[:20]}, which is not a known layout. Expected one "
        "of: lbl.json(.gz) and trn.json(.gz); raw/Y.txt, raw/trn_X.txt and Y.trn.npz; output-items.txt, X.trn.txt and "
        "Y.trn.npz; output-labels.txt and training-data.txt; Y.txt, trn_X.txt and trn_X_Y.txt; labels.jsonl and "
        "train.jsonl (or .parquet); train.csv (or .tsv, .jsonl, .parquet) with texts and label names; train.txt of "
        "fastText; train_raw_texts.txt and train_labels.txt; full texts of Annif with .tsv or .key files; "
        f"a README.md with the configs `default` and `labels`; {PREPARED}."
    )


def _load_raw(folder: Path, errors: str) -> XMCData:
    load_report: Counter[str] = Counter()
    label_file, train_file, test_file = (only(folder, _json_names(name)) for name in ("lbl", "trn", "tst"))
    if label_file is None:
        raise ValueError(f"{folder} has trn.json(.gz), but lbl.json(.gz) is missing.")
    if train_file is None:
        raise ValueError(f"{folder} has lbl.json(.gz), but trn.json(.gz) is missing.")
    texts, ids = formats.read_json_labels(label_file, load_report, errors)
    labels = label_table(texts, ids, str(folder), load_report)
    check_unique_uids(labels, lambda row: f"{label_file}:{row + 1}")
    splits = {"train": formats.read_json_rows(train_file, load_report, errors)}
    if test_file:
        splits["test"] = formats.read_json_rows(test_file, load_report, errors)
    pairs = text_filters(folder, splits, len(labels), load_report)
    return XMCData.of_parts(assemble(labels, splits, pairs, load_report))


def load_tables(folder: Path, errors: str) -> XMCData:
    files = {name: path for name in ("labels", *SPLITS) if (path := only(folder, _table_names(name)))}
    if "train" not in files and (folder / "README.md").exists():
        return load_hub_layout(str(folder), folder, errors)  # a repository with its labels at the root
    if "train" not in files:
        raise ValueError(f"{folder} has a labels table, but train.jsonl or train.parquet is missing.")
    load_report: Counter[str] = Counter()
    loaded = {
        name: read_table(path, LABELS if name == "labels" else QUERIES, f"{folder}, {name}", load_report, errors)
        for name, path in files.items()
    }
    pairs = only(folder, _table_names("filter_pairs"))
    filters = {"test": read_table(pairs, PAIRS, f"{folder}, filter_pairs", load_report, errors)} if pairs else {}
    if others := sorted(path.name for path in set(folder.glob("*.*")) - {*files.values(), pairs} if _is_table(path)):
        logger.warning(
            "%s: ignored %s. The tables are labels, %s and filter_pairs, each as .jsonl or .parquet.",
            folder,
            ", ".join(others),
            ", ".join(SPLITS),
        )
    return _from_datasets(str(folder), loaded.pop("labels"), loaded, filters, load_report)


def load_hub_layout(name: str, folder: Path, errors: str) -> XMCData:
    """Read a folder with the layout of a Hub repository; messages call it ``name``."""
    configs = repository.configs_of(folder, name)
    if not {"default", "labels"} <= set(configs):
        raise ValueError(f"{name} must have the configs `default` (queries) and `labels`, got {list(configs)}.")
    load_report: Counter[str] = Counter()
    read = partial(read_config, name, folder, load_report=load_report, errors=errors)
    labels = read("labels", LABELS)
    if len(labels) != 1:
        raise ValueError(
            f"{name}, labels: expected one split, got {', '.join(labels)}. Keep the split with the labels."
        )
    splits = read("default", NAMED_QUERIES)
    filters = read("filter_pairs", PAIRS) if "filter_pairs" in configs else {}
    return _from_datasets(name, next(iter(labels.values())), splits, filters, load_report)


def _from_datasets(
    name: str,
    labels: Dataset,
    splits: dict[str, Dataset],
    filters: dict[str, Dataset],
    load_report: Counter[str],
) -> XMCData:
    ids: Iterable[object] = range(len(labels))
    column: pa.ChunkedArray | None = None
    if "uid" in labels.column_names:
        column = labels.with_format("arrow").select_columns("uid")[:]["uid"]
        if column.null_count:
            raise ValueError(f"{name}, labels, row {column.is_null().index(True).as_py()}: the uid is missing.")
        ids = column.to_pylist()
    if any("labels" in dataset.column_names for dataset in splits.values()):
        return _from_names(name, labels, splits, filters, load_report)
    where = f"{name}, labels, row "
    named = label_table(texts_of(labels, where), ids, name, load_report)
    rows: dict[str, Rows] = {}
    for split, dataset in splits.items():
        if split not in SPLITS:
            raise ValueError(f"{name}: splits must be among {', '.join(SPLITS)}, got {split!r}.")
        where = f"{name}, {split}, row "
        offsets, label_ids, scores = ragged(dataset, where)
        rows[split] = Rows(texts_of(dataset, where), offsets, label_ids, scores, (where + "{}").format)
    if "train" not in rows:
        raise ValueError(f"{name} has no split train, only {', '.join(rows)}.")
    if column is not None:
        used = np.concatenate([split.label_ids for split in rows.values()])
        check_numbering(column, used, f"{name}, labels")
    pairs = {}
    for split, dataset in filters.items():
        table, where = dataset.with_format("arrow")[:], f"{name}, filter_pairs of {split}"
        if not all(pa.types.is_integer(column.type) and not column.null_count for column in table.columns):
            raise ValueError(f"{where}: expected whole numbers, row and label, without gaps.")
        given = np.stack([np.asarray(column, dtype=np.int64) for column in table.columns], axis=1)
        check_filter_pairs(given, len(rows[split].texts) if split in rows else 0, count_labels(named), where)
        pairs[split] = np.unique(given, axis=0)
        count(load_report, f"filter_pairs of {split}: repeated pairs", len(given) - len(pairs[split]))
    return XMCData.of_parts(assemble(named, rows, pairs, load_report))


def _from_names(
    name: str,
    labels: Dataset,
    splits: dict[str, Dataset],
    filters: dict[str, Dataset],
    load_report: Counter[str],
) -> XMCData:
    """Return the data of queries with a column ``labels`` of names or uids."""
    rows = {}
    for split, dataset in splits.items():
        if split in SPLITS and "labels" not in dataset.column_names:
            raise ValueError(f"{name}, {split}: there is no column labels, as another split has.")
        table, where = dataset.with_format("arrow")[:], (f"{name}, {split}, row " + "{}").format
        scores = table["label_scores"] if "label_scores" in dataset.column_names else None
        rows[split] = NamedRows(table["text"], table["labels"], where, scores)
    pairs = {split: list(zip(table["row"], table["label"], strict=True)) for split, table in filters.items()}
    vocabulary = Vocabulary.of(labels)
    return XMCData.of_parts(assemble_named(rows, vocabulary, filter_pairs=pairs, load_report=load_report))


def _load_prepared(folder: Path, errors: str) -> XMCData:
    parts = prepared.read(folder)
    try:
        return XMCData.of_parts(parts)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _json_names(name: str) -> tuple[str, ...]:
    return f"{name}.json.gz", f"{name}.json"


def _is_table(path: Path) -> bool:
    """Return whether a file looks like a table of a data set, even if its name is not supported."""
    return path.suffix in (".jsonl", ".parquet") or path.name.startswith(("filter_", *(f"{name}." for name in SPLITS)))


def _table_names(name: str) -> tuple[str, ...]:
    return f"{name}.jsonl", f"{name}.parquet"


Reader = Callable[[Path, str], XMCData]  # reads a folder; the string says how to decode invalid UTF-8
LAYOUTS: tuple[tuple[tuple[str, ...], Reader], ...] = (  # each has one of these files
    ((PREPARED,), _load_prepared),
    ((*_json_names("lbl"), *_json_names("trn")), _load_raw),
    *((layout.marks, layout.load) for layout in (REFERENCE, PECOS, REPOSITORY)),
    ((text2text.LABELS, text2text.TEXTS["train"]), text2text.load_text2text),
    (_table_names("labels"), load_tables),
)


def layouts_of(folder: Path) -> list[tuple[Path, Reader]]:
    """Return the layouts of a folder, each with its reader and a file that identifies it."""
    found = [([folder / name for name in names if (folder / name).exists()], read) for names, read in LAYOUTS]
    return [(paths[0], read) for paths, read in found if paths]


def check_one_layout(folder: Path, files: Iterable[Path]) -> None:
    """Raise ``ValueError`` if there are files of two layouts."""
    one, other, *_ = *files, None, None
    if one and other:
        raise ValueError(
            f"{folder} contains {one.relative_to(folder)} and {other.relative_to(folder)}, which belong to two "
            "layouts. If these are two data sets, use one folder for each."
        )
