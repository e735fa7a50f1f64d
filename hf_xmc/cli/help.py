"""Help texts of commands and scripts."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that adds the default of each option, unless the help already states it."""

    def add_argument(self, action: argparse.Action) -> None:
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or "")
        if not told and action.help != argparse.SUPPRESS:
            action.help = f"{action.help or ''} (default: %(default)s)".strip()
        super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return the options of an action, without the ones that differ by ``-`` for ``_`` alone."""
        shown = [o for o in action.option_strings if not any(o != p and o == _dashed(p) for p in action.option_strings)]
        if (shown == list(action.option_strings) and len(shown) < 2) or not shown:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(shown) + value


def _dashed(option: str) -> str:
    return "--" + option[2:].replace("_", "-")
