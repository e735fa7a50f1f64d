"""Messages of the package in the words of the command line."""

from __future__ import annotations

import re
import shlex

LITERAL = r"'[^'`]*'|\"[^\"`]*\"|[\w.]+"
ARGUMENT = re.compile(rf"`(\w+)=({LITERAL})`")
CALL = re.compile(rf"`load_xmc\(({LITERAL})((?:, \w+=(?:{LITERAL}))*)(, \.\.\.)?\)`")
NAME = re.compile(
    r"`(text|labels|separator|vocabulary|language|unknown|encoding|output_dir|validation_size|threshold|top_k)`"
)


def with_options(message: str, command: str) -> str:
    """Return a message with arguments and calls of Python written as options of a command.

    Example:
        >>> with_options("Give `separator=';'` for several.", "train")
        "Give `--separator ';'` for several."
        >>> with_options("Write `load_xmc('books.csv', text='title', labels='year')`.", "train")
        'Write `hf-xmc train books.csv --text title --labels year`.'
    """

    def call(found: re.Match[str]) -> str:
        options = [_option(name, value) for name, value in re.findall(rf", (\w+)=({LITERAL})", found[2])]
        data = _quoted(found[1])
        end = " ..." if found[3] else ""
        return f"`{' '.join(['hf-xmc', command, data, *options])}{end}`"

    message = CALL.sub(call, message)
    message = ARGUMENT.sub(lambda found: f"`{_option(found[1], found[2])}`", message)
    return NAME.sub(lambda found: f"--{found[1]}", message)


def _option(name: str, value: str) -> str:
    return f"--{name} {_quoted(value)}"


def _quoted(literal: str) -> str:
    """Return a Python literal as a word of a shell."""
    if literal[0] not in "'\"":
        return literal.lower()
    return shlex.quote(literal[1:-1].replace("\\t", "\t"))
