"""``hf-xmc``: train, prepare data, index labels, predict, evaluate, serve and push from the command line."""

from hf_xmc.cli.entry import main
from hf_xmc.cli.help import HelpFormatter

__all__ = ["HelpFormatter", "main"]
