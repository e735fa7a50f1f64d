"""``hf-xmc``: train, prepare data, index labels, predict, evaluate, serve and push from the command line."""

import os

from hf_xmc.cli.entry import main
from hf_xmc.cli.help import HelpFormatter

__all__ = ["HelpFormatter", "main"]

# A thread that waits sleeps, so that other programs have its core. OpenMP reads this as torch is imported: the modules
# above do not import it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
