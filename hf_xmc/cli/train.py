"""``hf-xmc train``: from a table or a data set to a saved model, its metrics and a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_xmc.cli.help import HelpFormatter
from hf_xmc.experiment.options import parse
from hf_xmc.experiment.run import load, run

logger = logging.getLogger(__name__)

USAGE = "hf-xmc train [settings.yaml ...] data [--text COLUMNS --labels COLUMN] --output_dir FOLDER [options]"
DESCRIPTION = """Train a dual encoder with all labels as negatives.

Settings may be in YAML files, where later files override earlier ones, and options override both. Other settings are
derived from the encoder and the data, and logged. The output folder gets model/, metrics.json, history.json and
report.html. Steps that need a missing validation or test split are skipped.

These are the most common options; --help-all also shows those of transformers and sentence-transformers."""
EPILOG = """Example:
  hf-xmc train books.csv --text title,abstract --labels subjects --separator ';' --output_dir runs/books
  hf-xmc predict runs/books/model "a history of whaling"

Several processes: accelerate launch -m hf_xmc.cli train ..."""


def main(argv: Sequence[str]) -> None:
    """Train with these arguments, and print the results."""
    help_texts = {"usage": USAGE, "description": DESCRIPTION, "epilog": EPILOG}
    parsed = parse(argv, prog="hf-xmc train", formatter_class=HelpFormatter, **help_texts)
    if "output_dir" not in parsed.given:
        raise ValueError("`output_dir` must name a folder for the results, got none. Write `output_dir='runs/mine'`.")
    with _log_to_stderr():
        _, metrics = run(parsed.settings, parsed.args, load(parsed), given=parsed.given)
        if not metrics:  # not the first process
            return
        output_dir = Path(str(parsed.args.output_dir))
        page = f", report {output_dir / 'report.html'}" if (output_dir / "report.html").exists() else ""
        logger.info("trained in %.0f s: model %s%s", metrics["train_seconds"], output_dir / "model", page)
        logger.info('next: hf-xmc predict %s "a text"', output_dir / "model")
    shown = {name: metrics[name] for name in ("labels", "memory", "calibration") if name in metrics}
    print(json.dumps(_rounded(shown), indent=2, default=str))


def _rounded(value: Any) -> Any:
    """Return the value with all numbers in it rounded to four decimals; ``metrics.json`` has the exact ones."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return round(float(value), 4) if isinstance(value, float) else value


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the log of the package, from level INFO."""
    package, handler = logging.getLogger("hf_xmc"), logging.StreamHandler()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
