"""Virtual environments in which only some of the packages of this one are installed, and commands in them."""

import os
import shutil
import socket
import subprocess
import threading
import time
import venv
from importlib.metadata import distribution
from pathlib import Path

import requests
from packaging.requirements import Requirement

NOBODY = 10001  # the user of the container


def make_environment(folder, requirements):
    """Make an environment with requirements and all that they need, as links to the packages of this one."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = Path(folder).glob("lib/python*/site-packages")
    for name in _closure(map(Requirement, requirements)):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    return Path(folder)


def _closure(wanted):
    """Return the names of distributions, with those that they need under the extras asked for."""
    waiting, done = [(one, extra) for one in wanted for extra in ("", *one.extras)], set()
    while waiting:
        requirement, extra = waiting.pop()
        if (requirement.name, extra) in done:
            continue
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), requirement
        done.add((requirement.name, extra))
        for needed in map(Requirement, found.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed, more) for more in ("", *needed.extras)]
    return {name for name, _ in done}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A command that serves HTTP, in a process of its own that sees no other environment.

    Attributes:
        url: Its address.
        log: The lines that it wrote.
    """

    def __init__(self, command, port, *, cwd, environment, as_nobody=False):
        self.url, self.log = f"http://127.0.0.1:{port}", []
        if (
            as_nobody and os.geteuid() == 0
        ):  # the packages of root may be closed to others: it reads all, writes nothing
            reads = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
            command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *reads, *command]
            command[0] = shutil.which("setpriv")
        environment = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", **environment}
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def __enter__(self):
        deadline = time.monotonic() + 240
        while True:
            try:
                if requests.get(f"{self.url}/health", timeout=60).ok:
                    return self
            except requests.ConnectionError:
                assert self.process.poll() is None, "".join(self.log)
                assert time.monotonic() < deadline, "".join(self.log)
                time.sleep(0.1)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(150)
        self._reader.join(10)
