"""The files of PECOS' text2text application: lines ``0,3<TAB>text``, and one label per line."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from hf_xmc.data.assembly import assemble, label_table
from hf_xmc.data.dataset import XMCData
from hf_xmc.data.readers.formats import Rows, TextBuilder, read_lines, read_texts

LABELS = "output-labels.txt"
TEXTS = {"train": "training-data.txt", "test": "test-data.txt"}


def load_text2text(folder: Path, errors: str) -> XMCData:
    """Load a folder with ``output-labels.txt``, ``training-data.txt`` and optionally ``test-data.txt``.

    Raises:
        ValueError: if a file is missing, a line has another form, or a number is not that of a label.
    """
    for name in (LABELS, TEXTS["train"]):
        if not (folder / name).exists():
            other = TEXTS["train"] if name == LABELS else LABELS
            raise ValueError(f"{folder} has {other} of PECOS' text2text, but {name} is missing.")
    report = Counter[str]()
    texts = read_texts(folder / LABELS, report, errors)
    labels = label_table(texts, range(len(texts)), str(folder), report)
    files = {split: folder / name for split, name in TEXTS.items() if (folder / name).exists()}
    splits = {split: read_numbered_lines(path, report, errors) for split, path in files.items()}
    return XMCData.of_parts(assemble(labels, splits, {}, report))


def check_not_alone(path: Path) -> None:
    """Raise ``ValueError`` if a path is a single file of this layout, by its name; only their folder can be loaded."""
    if path.name not in (LABELS, *TEXTS.values()) or not path.is_file():
        return
    missing = [name for name in (LABELS, TEXTS["train"]) if not (path.parent / name).exists()]
    names = f"{' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} missing"
    raise ValueError(
        f"{path} is one file of a data set of PECOS' text2text. Pass the folder: `load_xmc({str(path.parent)!r})`."
        f"{f' It must also have {names}.' if missing else ''}"
    )


def read_numbered_lines(path: Path, report: Counter[str], errors: str = "strict") -> Rows:
    """Return the queries in a file of lines ``0,3<TAB>text``, where numbers are label ids.

    Raises:
        ValueError: if a line has no tab, or a label is not a number.
    """
    texts, offsets, label_ids = TextBuilder(), array("q", [0]), array("q")
    for line, where in read_lines(path, report, errors):
        numbers, tab, text = line.removesuffix("\r").partition("\t")
        try:
            if not tab:
                raise ValueError
            label_ids.extend(int(number) for number in numbers.split(",") if numbers.strip())
        except (ValueError, OverflowError):
            raise ValueError(
                f"{where}: expected `0,3<TAB>text`, numbers of labels and a text, got {line[:80]!r}."
            ) from None
        texts.append(text)
        offsets.append(len(label_ids))
    return Rows(texts.done(), np.array(offsets), np.array(label_ids, np.int64), None, lambda row: f"{path}:{row + 1}")
