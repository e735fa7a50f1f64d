"""Convert the public raw files of the paper's data sets to the paper's texts, in a layout that `load_xmc` reads.

    python recipes/paper/raw.py titles LF-Amazon-131K LF-AmazonTitles-131K
    python recipes/paper/raw.py wikipedia LF-Wikipedia-500K.raw LF-Wikipedia-500K
    python recipes/paper/raw.py eurlex Eurlex-4K EURLex-4K
    hf-xmc prepare LF-AmazonTitles-131K LF-AmazonTitles-131K.prepared

`titles`: the Amazon files also have descriptions, which belong to another task, LF-Amazon. Only the titles are kept,
without surrounding spaces. `wikipedia`: a text is title, title and content, in lower case, with spaces instead of all
characters except letters, digits and full stops; labels are the last part of each line of `Yf.txt`, after `->`.
`eurlex`: the files of X-Transformer or PECOS, renamed as in the paper's code.

Files are converted line by line and may be gzipped. Filter files are copied.
"""

import argparse
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from hf_xmc.cli import HelpFormatter

EURLEX = {
    "raw/trn_X.txt": ("train_raw_texts.txt", "X.trn.txt"),
    "raw/tst_X.txt": ("test_raw_texts.txt", "X.tst.txt"),
    "raw/Y.txt": ("label_map.txt", "output-items.txt"),
    "Y.trn.npz": ("Y.trn.npz",),
    "Y.tst.npz": ("Y.tst.npz",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("kind", choices=("titles", "wikipedia", "eurlex"))
    parser.add_argument("raw", type=Path, help="folder of the public files")
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    {"titles": titles, "wikipedia": wikipedia, "eurlex": eurlex}[arguments.kind](arguments.raw, arguments.output_dir)


def titles(raw: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("lbl", "trn", "tst"):
        rewrite(source(raw, f"{name}.json"), out / f"{name}.json.gz", lambda record: text(record, "title").strip())
    for path in raw.glob("filter_labels_*.txt"):
        shutil.copy(path, out)


def wikipedia(raw: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("trn", "tst"):
        rewrite(source(raw, f"{name}.raw.json"), out / f"{name}.json.gz", wikipedia_text)
    with gzip.open(out / "lbl.json.gz", "wt", encoding="utf-8", newline="\n", compresslevel=1) as labels:
        for number, line in enumerate(lines(source(raw, "Yf.txt"))):
            write(labels, {"uid": str(number), "title": plain(line.strip().split("->")[-1])})


def eurlex(raw: Path, out: Path) -> None:
    (out / "raw").mkdir(parents=True, exist_ok=True)
    for target, names in EURLEX.items():
        shutil.copy(source(raw, *names), out / target)


def wikipedia_text(record: dict) -> str:
    title = text(record, "title")
    return plain(f"{title} {title} {text(record, 'content')}")


def plain(words: str) -> str:
    return " ".join(re.findall(r"[a-z0-9.]+", words.lower()))


def text(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"{key} must be a string, got {record.get(key)!r}. The keys are {', '.join(record)}.")
    return record[key]


def rewrite(path: Path, target: Path, text_of: Callable[[dict], str]) -> None:
    """Yield the records of a file with one text each, and with any labels."""
    with gzip.open(target, "wt", encoding="utf-8", newline="\n", compresslevel=1) as file:
        for number, line in enumerate(lines(path), start=1):
            try:
                record = json.loads(line)
                kept = {key: record[key] for key in ("uid", "target_ind", "target_rel") if key in record}
                write(file, {**kept, "title": text_of(record)})
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            yield line.decode()


def write(file: TextIO, record: dict) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def source(folder: Path, *names: str) -> Path:
    """Return the file with one of these names, gzipped or not."""
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                return path
    raise ValueError(
        f"{folder} must contain {' or '.join(names)}, got {sorted(p.name for p in folder.iterdir())[:20]}."
    )


if __name__ == "__main__":
    main()
