"""Build ``wordnet-hypernyms`` from the files of WordNet 3.0, in the format of the Extreme Classification Repository.

    apt-get install wordnet-base
    python recipes/data/build_wordnet_hypernyms.py --wordnet /usr/share/wordnet --output_dir my-copy

A query is a noun or verb synset; its labels are all its hypernym ancestors. README.md beside the data states every
rule. The files' format is described in WordNet's manual page wndb(5WN).
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path

from hf_xmc.cli import HelpFormatter

HYPERNYMS = ("@", "@i")  # "@" is a kind of, "@i" is an instance of


def read_synsets(path: Path) -> dict[str, tuple[str, str, list[str]]]:
    """Map the id of every synset, such as ``n00001740``, to its lemmas, its gloss and its direct hypernyms' ids."""
    synsets = {}
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence stands indented at the top of every file
            continue
        data, gloss = line.split(" | ", maxsplit=1)
        # offset, file, kind, number of lemmas (hexadecimal), (lemma, sense) pairs, number of pointers, 4-field pointers
        fields = data.split()
        offset, kind, num_lemmas = fields[0], fields[2], int(fields[3], 16)
        lemmas = fields[4 : 4 + 2 * num_lemmas : 2]
        pointers_start = 4 + 2 * num_lemmas
        num_pointers = int(fields[pointers_start])
        pointers = [fields[pointers_start + 1 + 4 * i :][:4] for i in range(num_pointers)]
        hypernyms = [target_kind + target for symbol, target, target_kind, _ in pointers if symbol in HYPERNYMS]
        synsets[kind + offset] = (", ".join(lemmas).replace("_", " "), gloss.strip(), hypernyms)
    return synsets


def ancestors_of(synset_id: str, synsets: dict[str, tuple[str, str, list[str]]]) -> set[str]:
    """Everything reachable over hypernym pointers, except the synset itself."""
    found: set[str] = set()
    to_visit = [synset_id]
    while to_visit:
        parents = set(synsets[to_visit.pop()][2]) - found
        found |= parents
        to_visit.extend(parents)
    return found - {synset_id}  # WordNet 3.0 has one cycle: the verbs "restrain" and "inhibit"


def is_test(synset_id: str) -> bool:
    return int(hashlib.sha1(synset_id.encode()).hexdigest(), 16) % 5 == 0


def write_json_lines(path: Path, rows: list[dict]) -> None:
    # An empty name and time zero in the header: the same rows give the same bytes.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as stream:
        for row in rows:
            stream.write((json.dumps(row) + "\n").encode())


def build(synsets: dict[str, tuple[str, str, list[str]]], output_dir: Path) -> None:
    ancestors = {synset_id: ancestors_of(synset_id, synsets) for synset_id in sorted(synsets)}

    label_ids = sorted(set().union(*(found for synset_id, found in ancestors.items() if not is_test(synset_id))))
    row_of_label = {label_id: row for row, label_id in enumerate(label_ids)}

    def text(synset_id: str) -> dict[str, str]:
        lemmas, gloss, _ = synsets[synset_id]
        return {"uid": synset_id, "title": lemmas, "content": gloss}

    output_dir.mkdir(parents=True, exist_ok=True)
    write_json_lines(output_dir / "lbl.json.gz", [text(label_id) for label_id in label_ids])
    for short, name, wanted in (("trn", "train", False), ("tst", "test", True)):
        rows, filter_pairs = [], []
        for synset_id, found in ancestors.items():
            target_ind = sorted(row_of_label[label_id] for label_id in found if label_id in row_of_label)
            if is_test(synset_id) != wanted or not target_ind:
                continue
            if synset_id in row_of_label:
                filter_pairs.append(f"{len(rows)} {row_of_label[synset_id]}\n")
            rows.append({**text(synset_id), "target_ind": target_ind, "target_rel": [1.0] * len(target_ind)})
        write_json_lines(output_dir / f"{short}.json.gz", rows)
        (output_dir / f"filter_labels_{name}.txt").write_text("".join(filter_pairs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="data.noun's folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    both = {**read_synsets(arguments.wordnet / "data.noun"), **read_synsets(arguments.wordnet / "data.verb")}
    build(both, arguments.output_dir)
