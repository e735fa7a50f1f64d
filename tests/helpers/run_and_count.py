"""Run by ``torchrun``: a script, and then a line with the number of threads of its process group that still run.

torchrun --nproc_per_node 2 tests/helpers/run_and_count.py SCRIPT [ARGUMENT ...]
"""

import runpy
import sys
from pathlib import Path


def group_threads():
    """Return the names of the threads of Gloo in this process, on Linux."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(f"{len(group_threads())} threads left", flush=True)
