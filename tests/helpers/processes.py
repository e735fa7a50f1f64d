"""Real processes, started as users start them."""

import os
import subprocess
import sys

from helpers.tiny import ROOT


def torchrun(num_processes, *command):
    """Run a script on some processes and return the finished job, whatever its exit code."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path()}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return subprocess.run(
        [*start, *map(str, command)], capture_output=True, text=True, timeout=280, env=environment, check=False
    )


def launch(num_processes, *command):
    """Run a script on some processes, which must end well, and return what they printed."""
    done = torchrun(num_processes, *command)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def path():
    """Return a ``PYTHONPATH`` with which a new process finds the helpers of the tests."""
    return os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
