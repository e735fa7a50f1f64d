"""The call traces of CONTRIBUTING name functions that exist."""

import importlib
import re
from functools import reduce
from pathlib import Path

from test_floors import FILES

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_line_of_a_trace_names_a_function():
    section = TEXT.split("## Three call traces\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    lines = [line.split()[0] for block in blocks for line in block.splitlines()]
    assert len(lines) > 30
    for line in lines:
        module = max((name for name in FILES if line.startswith(f"{name}.")), key=len)
        names = line.removeprefix(f"{module}.").split(".")
        assert callable(reduce(getattr, names, importlib.import_module(f"hf_xmc.{module}"))), line
