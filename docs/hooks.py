"""Build hooks of the documentation: docstrings in Markdown, generated tables, and formulas as MathML."""

import argparse
import contextlib
import io
import re
from dataclasses import MISSING, fields
from html import unescape
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.S)
GENERATED = re.compile(r"^<!-- (fields|help): (\S+) -->$", flags=re.M)


def to_markdown(text: str) -> str:
    """Return a docstring with its roles, formulas and doctests as Markdown."""
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`", lambda found: _code(found[1]), text)
    text = re.sub(r"^( +)(\w+(?:, \w+)+): ((?:.+\n?)(?:\1 +.+\n?)*)", _one_each, text, flags=re.M)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"^( *)\.\. math::\s+(.+(?:\n\1 +\S.*)*)", _display, text, flags=re.M)
    return re.sub(r"(?:^ *(?:>>>|\.\.\.).*\n(?:^ *(?!>>>)\S.*\n?)*)+", _doctest, text + "\n", flags=re.M).rstrip()


def _code(name: str) -> str:
    return f"`{name.removeprefix('hf_xmc.').rsplit('.', 1)[-1]}`"


def _one_each(found: re.Match[str]) -> str:
    """Return the description of several arguments once for each of them."""
    text = found[3].rstrip("\n")
    return "".join(f"{found[1]}{name}: {text}\n" for name in found[2].split(", "))


def _display(found: re.Match[str]) -> str:
    lines = " ".join(line.strip() for line in found[2].splitlines())
    return f"{found[1]}\n{found[1]}$$\n{found[1]}{lines}\n{found[1]}$$\n"


def _doctest(found: re.Match[str]) -> str:
    indent = re.match(" *", found[0])[0]  # type: ignore[index]
    return f"\n{indent}```pycon\n{found[0].rstrip()}\n{indent}```\n"


class Docstrings(griffe.Extension):
    """Rewrite docstrings, which are written for readers of the source, as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace `<!-- fields: CLASS -->` and `<!-- help: COMMAND -->` with a table and a help text."""
    makers = {"fields": table_of_fields, "help": help_of}
    return GENERATED.sub(lambda found: makers[found[1]](found[2]), markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Write formulas as MathML, which browsers show without a script."""
    return FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    """Return a formula as MathML; one on its own line can be scrolled on a phone."""
    inline = found[2] == "("
    formula = convert(unescape(found[3]), display="inline" if inline else "block")
    return formula if inline else f'<div class="formula">{formula}</div>'


def table_of_fields(name: str) -> str:
    """Return a table of the fields that a dataclass of ``hf_xmc`` adds to its base."""
    import hf_xmc

    added = [
        field for field in fields(getattr(hf_xmc, name)) if field.name in vars(getattr(hf_xmc, name))["__annotations__"]
    ]
    rows = [f"| `{field.name}` | `{_default(field)}` | {field.metadata['help']} |" for field in added if field.metadata]
    return "\n".join(["| argument | default | meaning |", "|---|---|---|", *rows])


def _default(field: Any) -> str:
    return "required" if field.default is MISSING else repr(field.default)


def help_of(command: str) -> str:
    """Return what `hf-xmc COMMAND --help` prints."""
    from hf_xmc.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit, argparse.ArgumentError):
        main([command, "--help"])
    return f"```text\n{printed.getvalue().rstrip()}\n```"
