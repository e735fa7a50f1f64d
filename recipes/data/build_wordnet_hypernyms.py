"""Build ``wordnet-hypernyms`` from the files of WordNet 3.0, in the format of the Extreme Classification Repository.

    apt-get install wordnet-base
    python recipes/data/build_wordnet_hypernyms.py --wordnet /usr/share/wordnet --output_dir my-copy

A query is a noun or verb synset; its labels are all its hypernym ancestors. README.md next to the data states every
rule. WordNet's manual page wndb(5WN) describes the file format. `--parents` also writes the direct hypernyms of all
synsets, for `hf_xmc.Hierarchy.read`.
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from hf_xmc.cli import HelpFormatter

HYPERNYMS = ("@", "@i")  # "@" is a kind of, "@i" is an instance of


def read_synsets(path: Path) -> dict[str, tuple[str, str, list[str]]]:
    """Map the id of every synset, such as ``n00001740``, to its lemmas, its gloss and its direct hypernyms' ids."""
    synsets = {}
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence is indented at the top of every file
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
    """Return all synsets reachable by hypernym pointers, except the synset itself."""
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
    # An empty name and time zero in the header, so that the same rows give the same bytes.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as stream:
        for row in rows:
            stream.write((json.dumps(row) + "\n").encode())


def build(synsets: dict[str, tuple[str, str, list[str]]], output_dir: Path) -> None:
    ancestors = {synset_id: ancestors_of(synset_id, synsets) for synset_id in sorted(synsets)}
    label_ids = sorted(set().union(*(found for synset_id, found in ancestors.items() if not is_test(synset_id))))
    texts = {synset_id: (lemmas, gloss) for synset_id, (lemmas, gloss, _) in synsets.items()}
    write_data_set(output_dir, {uid: texts[uid] for uid in label_ids}, texts, ancestors, is_test)


def write_parents(path: Path, synsets: dict[str, tuple[str, str, list[str]]]) -> None:
    """Write a line ``uid TAB parent_uid`` for each direct hypernym of a synset; those of a cycle are left out."""
    pairs = ((uid, parent) for uid in sorted(synsets) for parent in synsets[uid][2])
    lines = (f"{uid}\t{parent}\n" for uid, parent in pairs if uid not in ancestors_of(parent, synsets))
    path.write_text("".join(lines))


def write_data_set(
    output_dir: Path,
    labels: Mapping[str, tuple[str, str]],
    queries: Mapping[str, tuple[str, str]],
    positives: Mapping[str, Iterable[str]],
    is_test: Callable[[str], bool],
) -> None:
    """Write a data set in the raw format of the Extreme Classification Repository.

    Positives that are not among the labels are left out, and so are queries without positives.

    Args:
        output_dir: The folder, made if it does not exist.
        labels: The two texts, ``title`` and ``content``, of each label by its uid.
        queries: The same of each query.
        positives: The labels of each query. The rows of the queries have this order.
        is_test: Whether the query of a uid belongs to the test split.
    """
    row_of_label = {uid: row for row, uid in enumerate(labels)}

    def texts_of(uid: str, texts: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        title, content = texts[uid]
        return {"uid": uid, "title": title, "content": content}

    output_dir.mkdir(parents=True, exist_ok=True)
    write_json_lines(output_dir / "lbl.json.gz", [texts_of(uid, labels) for uid in labels])
    for short, name, wanted in (("trn", "train", False), ("tst", "test", True)):
        rows, filter_pairs = [], []
        for query, found in positives.items():
            target_ind = sorted(row_of_label[uid] for uid in found if uid in row_of_label)
            if is_test(query) != wanted or not target_ind:
                continue
            if query in row_of_label:
                filter_pairs.append(f"{len(rows)} {row_of_label[query]}\n")
            rows.append({**texts_of(query, queries), "target_ind": target_ind, "target_rel": [1.0] * len(target_ind)})
        write_json_lines(output_dir / f"{short}.json.gz", rows)
        (output_dir / f"filter_labels_{name}.txt").write_text("".join(filter_pairs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="data.noun's folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parents", type=Path, help="file for the direct hypernyms of all synsets")
    arguments = parser.parse_args()
    both = {**read_synsets(arguments.wordnet / "data.noun"), **read_synsets(arguments.wordnet / "data.verb")}
    build(both, arguments.output_dir)
    if arguments.parents is not None:
        write_parents(arguments.parents, both)
