"""The command ``hf-xmc`` and its subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from hf_xmc.cli import evaluate, predict, prepare, push, serve
from hf_xmc.cli.help import HelpFormatter
from hf_xmc.cli.messages import with_options

RESUME = {
    "train": " With `--resume_from_checkpoint true`, the same command continues from a checkpoint, if there is one.",
    "predict": " If it wrote lines of JSON to --output, the same command with --resume continues.",
}
DESCRIPTION = "Train models, predict labels of texts, and evaluate, from the command line."


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hf-xmc`` with these arguments; return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        _parser().print_help()
        return 2
    arguments = argparse.Namespace(command="train") if argv[:1] == ["train"] else _parser().parse_args(argv)
    try:
        if arguments.command == "train":
            from hf_xmc.cli import train

            train.main(argv[1:])  # its parser takes seconds to import
        else:
            from hf_xmc.encoders.progress import no_file_bars

            with no_file_bars():
                arguments.run(arguments)
    except BrokenPipeError:  # the reader stopped, as in `hf-xmc predict ... | head`
        sys.stderr.close()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"hf-xmc {arguments.command}: {with_options(str(error), arguments.command)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nhf-xmc {arguments.command}: stopped.{RESUME.get(arguments.command, '')}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-xmc", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, formatter_class=HelpFormatter)
    add("train", help="train a model from a table or a data set, and measure it", add_help=False)
    for module in (prepare, predict, evaluate, serve, push):
        module.add_commands(add)
    return parser
