"""Real servers on free ports, in a thread of the test or in a process as users start it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import uvicorn
from datasets import Dataset

from helpers.tiny import LABELS, POSITIVES, make_static_encoder
from hf_xmc import XMCModel
from hf_xmc.serving.app import create_app
from hf_xmc.serving.settings import ServerSettings

TEXTS = [f"text {number} about {' and '.join(LABELS[p] for p in ids)}" for number, ids in enumerate(POSITIVES)]


def make_model():
    """A model with a memory, and probabilities that were fitted on other texts."""
    labels = Dataset.from_dict(
        {"uid": [f"http://example.org/{text.replace(' ', '-')}" for text in LABELS], "text": LABELS}
    )
    model = XMCModel(make_static_encoder(), labels)
    model.remember(Dataset.from_dict({"text": TEXTS, "label_ids": POSITIVES}))
    others = [text.replace("about", "and") for text in TEXTS]
    model.calibrate(Dataset.from_dict({"text": others, "label_ids": POSITIVES}))
    return model


@contextmanager
def running(model, with_page=False, **settings):
    """Serve a model in a thread; yields the address."""
    app = create_app(model, ServerSettings(**settings), with_page=with_page)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class ServerProcess:
    """``hf-xmc serve`` in its own process.

    Attributes:
        url: Its address.
        log: The lines of its log, parsed. A line that is not JSON is marked by `is_text`.
    """

    def __init__(self, *arguments, port=0, **environment):
        command = [sys.executable, "-m", "hf_xmc.cli", "serve", *map(str, arguments), "--port", str(port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        self.log, self.url = [], None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.log.append(json.loads(line) if line.startswith("{") else {"message": line, "is_text": True})
            if "running on" in line:
                self.url = line.split("running on ")[1].split()[0]

    def wait_until_ready(self):
        deadline = time.monotonic() + 240
        while not any("startup complete" in row["message"] for row in self.log) or self.url is None:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        return self.url

    def stop(self):
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(150)  # its parent may wait for a killed worker's ping, for 60 seconds
        self._reader.join(10)
        return code
