"""Build a data set of theorems and the theorems that their proofs use, from the Metamath database ``set.mm``.

    apt-get download metamath-databases && dpkg-deb -x metamath-databases_*.deb metamath
    python recipes/data/build_metamath.py --database metamath/usr/share/metamath/databases/set.mm --output_dir premises

A query is a theorem: its comment in English, and its formula with its hypotheses. Its labels are the theorems, axioms
and definitions that its proof names, with texts of the same kind. Hypotheses and axioms of syntax are no labels. The
last 15 % of the theorems, in the order of the file, are test, so their proofs use labels that no training query has.

Comments lose their references to other theorems, which would give labels away, and their credits. ``set.mm`` is in the
public domain (CC0).
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from build_wordnet_hypernyms import write_data_set

from hf_xmc.cli import HelpFormatter

TEST_PERCENT = 15
PROVABLE = "|-"  # the typecode of theorems; others, such as "wff" and "class", are those of syntax
CREDITS = re.compile(r"\((?:Contributed|Revised|Revision|Proof|New usage|Future|Moved)\b[^()]*(?:\([^()]*\)[^()]*)*\)")
REFERENCE = re.compile(r"~\s+\S+")
TAG = re.compile(r"</?[A-Za-z][^<>]*>")


class Statement(NamedTuple):
    """A theorem, an axiom or a definition."""

    label: str
    comment: str
    formula: str
    used: list[str]  # labels in the proof, in their order; none for an axiom


def read_statements(path: Path) -> list[Statement]:
    """Return the statements with the typecode ``|-``, in the order of the file."""
    tokens = iter(path.read_text(encoding="ascii").split())
    statements: list[Statement] = []
    scopes: list[list[str]] = [[]]  # the formulas of the hypotheses, by block
    comment = label = ""
    for token in tokens:
        if token == "$(":
            comment = " ".join(until("$)", tokens))
        elif token == "${":
            scopes.append([])
        elif token == "$}":
            scopes.pop()
        elif token in ("$c", "$v", "$d", "$f"):
            for _ in until("$.", tokens):
                pass
        elif token == "$e":
            typecode, *symbols = until("$.", tokens)
            scopes[-1].append(" ".join(symbols))
        elif token in ("$a", "$p"):
            typecode, *symbols = until("$." if token == "$a" else "$=", tokens)
            proof = list(until("$.", tokens)) if token == "$p" else []
            if typecode == PROVABLE:
                hypotheses = " & ".join(formula for scope in scopes for formula in scope)
                formula = f"{hypotheses} => {' '.join(symbols)}" if hypotheses else " ".join(symbols)
                statements.append(Statement(label, plain(comment), formula, labels_of(proof)))
            comment = ""
        else:
            label = token
    names = {statement.label for statement in statements}
    return [statement._replace(used=[name for name in statement.used if name in names]) for statement in statements]


def until(end: str, tokens: Iterator[str]) -> Iterator[str]:
    """Yield the tokens before ``end``, without comments, and skip ``end``."""
    for token in tokens:
        if token == end:
            return
        if token == "$(":
            for _ in until("$)", tokens):
                pass
        else:
            yield token
    raise ValueError(f"expected {end} before the end of the file. Is the file complete?")


def labels_of(proof: list[str]) -> list[str]:
    """Return the labels in a proof; a compressed one has them in parentheses before the letters of its steps."""
    if proof[:1] == ["("]:
        proof = proof[1 : proof.index(")")]
    return list(dict.fromkeys(proof))


def plain(comment: str) -> str:
    """Return a comment without references, credits and markup; formulas between backquotes stay."""
    comment = CREDITS.sub(" ", comment)
    parts = comment.replace("``", "\0").split("`")
    for place in range(0, len(parts), 2):  # the others are formulas
        text = TAG.sub(" ", REFERENCE.sub(" ", parts[place]))
        parts[place] = re.sub(r"(?<![^\s(\"'])_(\S[^_]*)_", r"\1", text)
    return " ".join(" ".join(parts).replace("\0", "`").split())


def build(statements: list[Statement], output_dir: Path) -> None:
    texts = {statement.label: (statement.comment, statement.formula) for statement in statements}
    positives = {statement.label: statement.used for statement in statements if statement.used}
    names = list(positives)
    test = set(names[len(names) * (100 - TEST_PERCENT) // 100 :])
    labels = {uid: texts[uid] for uid in sorted(set().union(*positives.values()))}
    write_data_set(output_dir, labels, texts, positives, test.__contains__)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--database", type=Path, required=True, help="the database, set.mm")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    build(read_statements(arguments.database), arguments.output_dir)
