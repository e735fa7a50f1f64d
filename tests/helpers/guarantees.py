"""Counts of the faults that the suite survives, in ``runs/faults.json``, and the tables made from them.

After `make test-all`, `python tests/helpers/guarantees.py` writes the tables of docs/results/reliability.md and
tests/README.md.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNTS = ROOT / "runs" / "faults.json"
KINDS = ("faults", "inputs", "lost")
PROMISE = re.compile(
    r'@pytest\.mark\.promise\(\s*"([^"]+)"\s*\)\n(?:@[^\n]*\n(?:[ )\]}][^\n]*\n)*)*def (test_\w+)', re.M
)


class Tally:
    """Counts of one test: ``tally(faults=1)`` for a fault survived, ``inputs=1`` for a bad input that was refused or
    read for what it is, ``lost=1`` for anything that was lost."""

    def __init__(self):
        self.counts = dict.fromkeys(KINDS, 0)

    def __call__(self, **counts):
        for kind, number in counts.items():
            self.counts[kind] += number


def record(results):
    """Add the results of this run to those there are: ``{test: {promise, passed, faults, inputs, lost}}``.

    Deleting the file begins anew.
    """
    COUNTS.parent.mkdir(exist_ok=True)
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    COUNTS.write_text(json.dumps({**known, **results}, indent=2, sort_keys=True) + "\n")


def declared():
    """Each promise with its tests, in the order of the files: ``{promise: [file::test]}``."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for promise, name in PROMISE.findall(path.read_text()):
            found.setdefault(promise, []).append(f"{path.relative_to(ROOT / 'tests').as_posix()}::{name}")
    return found


def count_table(results):
    lines = ["| Promise | Faults survived | Inputs tried | Lost |", "|---|---|---|---|"]
    total = dict.fromkeys(KINDS, 0)
    for promise in declared():
        mine = [result for result in results.values() if result["promise"] == promise]
        if failed := [result for result in mine if not result["passed"]]:
            raise SystemExit(f"{promise}: {len(failed)} test(s) failed; there is no table of that.")
        if not mine:
            print(f"left out, as no test of it has run: {promise}", file=sys.stderr)
            continue
        sums = {kind: sum(result[kind] for result in mine) for kind in KINDS}
        total = {kind: total[kind] + sums[kind] for kind in KINDS}
        lines.append(f"| {promise} | {' | '.join(f'{sums[kind]:,}' if sums[kind] else '' for kind in KINDS)} |")
    lines.append(f"| **In all** | {' | '.join(f'**{total[kind]:,}**' for kind in KINDS)} |")
    return "\n".join(lines)


def promise_table():
    lines = ["| Promise | Test |", "|---|---|"]
    lines += [f"| {promise} | {', '.join(f'`{test}`' for test in tests)} |" for promise, tests in declared().items()]
    return "\n".join(lines)


def between(text, name, table):
    """``text`` with what stands between the two marks of this name replaced."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    return text[: text.index(begin) + len(begin)] + table + text[text.index(end) :]


def main():
    for path, name, table in (
        (ROOT / "docs" / "results" / "reliability.md", "faults", count_table(json.loads(COUNTS.read_text()))),
        (ROOT / "tests" / "README.md", "promises", promise_table()),
    ):
        path.write_text(between(path.read_text(), name, table))


if __name__ == "__main__":
    main()
