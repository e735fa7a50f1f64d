"""Read the input lines of the commands, and write their output rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path | None) -> Iterator[str]:
    """Yield the lines of a file, or of standard input. Only a line feed ends a line."""
    stream = sys.stdin.buffer if path is None else path.open("rb")
    with stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path or 'standard input'}, line {number}: not UTF-8 ({error.reason}).") from None


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON.

    >>> line_of({"text": "ein rotes Boot"})
    '{"text": "ein rotes Boot"}\\n'
    """
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_row(row: dict[str, Any]) -> None:
    """Write a row to standard output, as a line of JSON."""
    sys.stdout.write(line_of(row))
