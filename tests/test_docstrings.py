"""Docstrings say what a thing is or does, and `Raises:` entries state conditions."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_xmc"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
HEADLESS = re.compile(r"(Of|With|What|Those|Whatever|How many|Which|As|Where|Such|From)\b")
RAISES = re.compile(r"^\s+(\w*(?:Error|Exception)): (.*)$", re.MULTILINE)


def docstrings(path):
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield getattr(node, "name", path), text.strip()


@pytest.mark.parametrize("path", FILES)
def test_docstrings_start_with_a_verb_or_a_noun(path):
    assert not [(name, text.splitlines()[0]) for name, text in docstrings(path) if HEADLESS.match(text)]


@pytest.mark.parametrize("path", FILES)
def test_raises_entries_start_with_a_condition(path):
    raised = [(name, *entry) for name, text in docstrings(path) for entry in RAISES.findall(text)]
    assert not [entry for entry in raised if not entry[2].startswith("if ")]
