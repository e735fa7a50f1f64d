"""Read tables in files and in repositories of the Hub, and only the required columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DownloadConfig, DownloadManager, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from hf_xmc.data.readers import formats
from hf_xmc.data.readers.formats import list_of, object_of, objects_of, parse_json, read_lines


class Columns(NamedTuple):
    """The columns to read from a table."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    instead: tuple[tuple[str, str], ...] = ()  # pairs of a required column and another one that may replace it

    def among(self, names: Collection[str], where: str) -> list[str]:
        """Return the columns to read from a table with these column names, in a fixed order.

        Raises:
            ValueError: if a required one is missing.
        """
        required = list(self.required)
        for name, other in self.instead:
            if name not in names and other in names:
                required[required.index(name)] = other
        if missing := sorted(set(required) - set(names)):
            hint = " If the labels of the queries are unknown, give each an empty list." * (missing == ["label_ids"])
            raise ValueError(f"{where}: there is no column {', '.join(missing)}, only {', '.join(names)}.{hint}")
        return [name for name in (*required, *self.optional) if name in names]


QUERIES = Columns(("text", "label_ids"), ("label_scores",))
NAMED_QUERIES = Columns(QUERIES.required, QUERIES.optional, (("label_ids", "labels"),))
LABELS = Columns(("text",), ("uid",))
PAIRS = Columns(("row", "label"))

TYPES = {"text": pa.string(), "label_ids": pa.list_(pa.int64()), "label_scores": pa.list_(pa.float64())}
NUMBERS = {"label_ids": int, "label_scores": (int, float)}  # in the lists of a column


def read_table(path: Path, columns: Columns, where: str, load_report: Counter[str], errors: str = "strict") -> Dataset:
    """Read the given columns of a ``.jsonl``, ``.json`` or ``.parquet`` file; ``where`` names the table.

    Raises:
        ValueError: if the file is damaged, a required column is missing, or a value in one of these columns has the
            wrong type. Other columns may contain anything.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path, columns, where)
    return _read_json(path, columns, where, load_report, errors)


def read_config(
    name: str, folder: Path, config: str, columns: Columns, load_report: Counter[str], errors: str = "strict"
) -> dict[str, Dataset]:
    """Read the given columns of one config of a folder with the layout of a Hub repository, split by split.

    Raises:
        ValueError: if :func:`read_table` raises it; if a file is missing; if a split does not have the number of rows
            in the card; or if ``datasets`` cannot read a file of another format.
    """
    try:
        builder = load_dataset_builder(str(folder), config)
    except Exception as error:  # `datasets` raises many types if it cannot find the files of a config
        raise ValueError(f"{name}, {config}: its files cannot be found ({error}).") from error
    files = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
    endings = {Path(url.removesuffix(".gz")).suffix for urls in files.values() for url in urls}
    if not files or not endings <= {".parquet", ".json", ".jsonl"} or getattr(builder.config, "field", None):
        return _read_other(name, folder, config, columns)
    manager = DownloadManager(builder.dataset_name, download_config=DownloadConfig(token=builder.token))
    tables = {}
    for split, urls in files.items():
        where = f"{name}, {split if columns is NAMED_QUERIES else config}"
        try:
            paths = manager.download(urls)
        except Exception as error:  # of a remote file; the error types depend on the version of its client
            raise ValueError(f"{where}: could not be downloaded ({type(error).__name__}: {error}).") from error
        parts = [read_table(Path(path), columns, where, load_report, errors).data.table for path in paths]
        tables[split] = Dataset(_joined(parts, where))
        said = (builder.info.splits or {}).get(split)
        if said is not None and said.num_examples not in (None, len(tables[split])):
            raise ValueError(
                f"{where}: the files have {len(tables[split])} rows, but the card says {said.num_examples}. Is a file "
                "missing, or is the card from another version?"
            )
    return tables


def _read_other(name: str, folder: Path, config: str, columns: Columns) -> dict[str, Dataset]:
    """Read a config in a format that only ``datasets`` can read."""
    try:
        splits = load_dataset(str(folder), config)
    except (DatasetGenerationError, pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}, {config}: not a readable table ({error.__cause__ or error}).") from None
    return {
        str(split): table.select_columns(columns.among(table.column_names, f"{name}, {split}"))
        for split, table in splits.items()
    }


def _read_parquet(path: Path, columns: Columns, where: str) -> Dataset:
    with _readable(path):
        file = pq.ParquetFile(path, memory_map=True)
    with file:
        chosen = columns.among(file.schema_arrow.names, where)
        with _readable(path):
            table = file.read(columns=chosen).select(chosen)
            return Dataset(table.replace_schema_metadata(None))  # the metadata also describes other columns


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # ValueError: an unsupported type
        raise ValueError(f"{path}: not a readable table ({error}).") from None


def _read_json(path: Path, columns: Columns, where: str, load_report: Counter[str], errors: str) -> Dataset:
    """Read JSON objects, one per line or in an array. The keys of the first object are the columns."""
    tables: list[pa.Table] = []
    records: list[dict[str, Any]] = []
    chosen: list[str] | None = None
    text_ids: bool | None = None  # whether the first uid is text

    def flush() -> None:
        try:
            arrays = [pa.array([record[name] for record in records], TYPES.get(name)) for name in chosen or ()]
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            first = sum(map(len, tables)) + 1
            raise ValueError(
                f"{path}:{first}: here, or in the next {len(records) - 1} lines, values have mixed types ({error})."
            ) from None
        tables.append(pa.table(arrays, names=chosen))
        records.clear()

    for record, line in _records(path, load_report, errors):
        chosen = columns.among(record, where) if chosen is None else chosen
        if late := sorted(set(columns.optional) & record.keys() - set(chosen)):
            raise ValueError(f"{line}: the first line must have all columns, but {', '.join(late)} appears here first.")
        kept = {name: record.get(name) for name in chosen}
        for name, value in kept.items():
            if value is not None:
                _check_value(name, value, line)
        if (uid := kept.get("uid")) is not None:
            text_ids = isinstance(uid, str) if text_ids is None else text_ids
            if isinstance(uid, str) != text_ids:
                raise ValueError(
                    f"{line}: uids must all be strings or all be numbers, got {uid!r} after others. Write all as "
                    "strings."
                )
        records.append(kept)
        if len(records) == formats.ROWS_A_BATCH:
            flush()
    if chosen is None:
        raise ValueError(f"{path} is empty. Remove the file if there is no such table.")
    if records:
        flush()
    return Dataset(_joined(tables, str(path)))


def _records(path: Path, load_report: Counter[str], errors: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each object of a file with its position."""
    lines = read_lines(path, load_report, errors)
    first = next(lines, None)
    lines = lines if first is None else chain([first], lines)
    if first and path.name.removesuffix(".gz").endswith(".json") and first[0].lstrip().startswith("["):
        content = "\n".join(text for text, _ in lines)
        for number, value in enumerate(parse_json(content, str(path))):
            where = f"{path}, object {number}"
            yield object_of(value, where), where
    else:
        yield from objects_of(lines)


def _check_value(name: str, value: object, where: str) -> None:
    """Raise if a value of a JSON object has the wrong type for its column."""
    if name == "text" and not isinstance(value, str):
        raise ValueError(f"{where}: text must be a string, got {value!r:.80}.")
    if name == "uid" and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"{where}: uid must be a string, got {value!r:.80}.")
    if name in NUMBERS:
        list_of({name: value}, name, NUMBERS[name], where)


def _joined(tables: Sequence[pa.Table], where: str) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{where}: parts of a column have different types ({error}).") from None
