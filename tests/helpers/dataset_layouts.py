"""One small data set, written in every layout that ``load_xmc`` reads."""

import gzip
import json

import numpy as np
import scipy.sparse as sp
from datasets import Dataset

LABELS = ["boat", "car", "animal", "red", "blue"]
TRAIN = [
    ("a red boat", [0, 3]),
    ("a car", [1]),
    ("line one\u2028still line one", [0]),
    ("a blue car", [4, 1]),
    ("nothing in particular", []),
    ("a dog: not a boat", [2]),
    ("rotes Boot \u00fc \U0001f6a2", [3, 0]),
]
TEST = [("the boat", [0]), ("red and blue", [3, 4]), ("", [2])]
FILTER_PAIRS = [[0, 0], [1, 2]]


def write_raw(folder):
    """The raw files of the Extreme Classification Repository."""
    write_gzip(folder / "lbl.json.gz", [{"uid": f"L{i}", "title": text} for i, text in enumerate(LABELS)])
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        records = []
        for number, (text, ids) in enumerate(rows):
            title, _, content = text.partition(": ")
            record = {"uid": str(number), "title": title, "content": content}
            records.append({**record, "target_ind": ids, "target_rel": [1.0] * len(ids)})
        write_gzip(folder / f"{name}.json.gz", records)
    write_pairs(folder)


def write_reference(folder):
    """The layout of the paper's code."""
    (folder / "raw").mkdir()
    write_lines(folder / "raw" / "Y.txt", LABELS)
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        write_lines(folder / "raw" / f"{name}_X.txt", [text for text, _ in rows])
        sp.save_npz(folder / f"Y.{name}.npz", matrix(rows))
    write_pairs(folder)


def write_pecos(folder):
    """The layout of PECOS, as its data sets are published."""
    write_lines(folder / "output-items.txt", LABELS)
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        write_lines(folder / f"X.{name}.txt", [text for text, _ in rows])
        sp.save_npz(folder / f"Y.{name}.npz", matrix(rows), compressed=False)
    write_pairs(folder)


def write_repository(folder):
    """The label matrices of the Extreme Classification Repository, with the raw texts."""
    write_lines(folder / "Y.txt", LABELS)
    for name, rows in (("trn", TRAIN), ("tst", TEST)):
        write_lines(folder / f"{name}_X.txt", [text for text, _ in rows])
        lines = [" ".join(f"{label}:1.00000" for label in sorted(ids)) for _, ids in rows]
        write_lines(folder / f"{name}_X_Y.txt", [f"{len(rows)} {len(LABELS)}", *lines])
    write_lines(folder / "tst_filter_labels.txt", [f"{row} {label}" for row, label in FILTER_PAIRS])


def write_jsonl(folder):
    write_lines(folder / "labels.jsonl", [dump({"uid": f"L{i}", "text": t}) for i, t in enumerate(LABELS)])
    for name, rows in (("train", TRAIN), ("test", TEST)):
        write_lines(folder / f"{name}.jsonl", [dump({"text": text, "label_ids": ids}) for text, ids in rows])
    write_lines(folder / "filter_pairs.jsonl", [dump({"row": row, "label": label}) for row, label in FILTER_PAIRS])


def write_parquet(folder):
    for name, table in tables().items():
        table.to_parquet(folder / f"{name}.parquet")


def write_hub(folder):
    """A repository of the Hub, as it lies in a folder."""
    (folder / "data").mkdir(parents=True)
    for name, table in tables().items():
        table.to_parquet(folder / "data" / f"{name}.parquet")
    (folder / "README.md").write_text(
        """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train.parquet}
  - {split: test, path: data/test.parquet}
- config_name: labels
  data_files: data/labels.parquet
- config_name: filter_pairs
  data_files:
  - {split: test, path: data/filter_pairs.parquet}
---
"""
    )


def write_prepared(folder):
    from hf_xmc import load_xmc

    source = folder.with_name(folder.name + "-raw")
    source.mkdir()
    write_raw(source)
    load_xmc(source).save(folder)


LAYOUTS = {
    "raw": write_raw,
    "reference": write_reference,
    "pecos": write_pecos,
    "repository": write_repository,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "hub": write_hub,
    "prepared": write_prepared,
}


def tables():
    yes = {name: {"text": [t for t, _ in rows], "label_ids": [ids for _, ids in rows]} for name, rows in SPLITS.items()}
    return {
        "labels": Dataset.from_dict({"uid": [f"L{i}" for i in range(len(LABELS))], "text": LABELS}),
        **{name: Dataset.from_dict(columns) for name, columns in yes.items()},
        "filter_pairs": Dataset.from_dict({"row": [r for r, _ in FILTER_PAIRS], "label": [c for _, c in FILTER_PAIRS]}),
    }


SPLITS = {"train": TRAIN, "test": TEST}


def matrix(rows, num_labels=5):
    dense = np.zeros((len(rows), num_labels), dtype=np.float32)
    for row, (_, ids) in enumerate(rows):
        dense[row, ids] = 1
    return sp.csr_matrix(dense)


def write_gzip(path, records):
    with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(dump(record) + "\n" for record in records)


def write_lines(path, lines):
    path.write_bytes("".join(line + "\n" for line in lines).encode())


def write_pairs(folder):
    write_lines(folder / "filter_labels_test.txt", [f"{row} {label}" for row, label in FILTER_PAIRS])


def dump(record):
    return json.dumps(record, ensure_ascii=False)
