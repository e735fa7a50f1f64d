"""The command ``hf-xmc serve`` as users start it."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPResponse

import psutil
import pytest
import requests
from helpers.server import ServerProcess, make_model

from hf_xmc import XMCModel
from hf_xmc.cli import main
from hf_xmc.serving.metrics import SHARED
from hf_xmc.serving.server import WORKER, worker_app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "my boats"
    make_model().save_pretrained(folder)
    return folder


def test_a_server_that_is_stopped_answers_the_requests_in_flight_first(folder):
    server = ServerProcess(folder, "--batch_wait_ms", 2000, HF_XMC_TOKEN="secret token")
    url, answers = server.wait_until_ready(), []
    headers = {"Authorization": "Bearer secret token"}

    def ask():
        answers.append(requests.post(f"{url}/predict", json={"texts": "a red boat"}, headers=headers, timeout=60))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    time.sleep(0.8)  # all are in the batch that waits for two seconds
    assert not answers
    assert server.stop() == -signal.SIGTERM  # uvicorn ends by the signal that it got
    for client in clients:
        client.join()
    (expected,) = [[label._asdict() for label in XMCModel.from_pretrained(folder).predict(["a red boat"] * 4)[0]]]
    assert [answer.json()["predictions"] for answer in answers] == [[expected]] * 4
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)
    assert sum(row["message"] == "request" for row in server.log) == 4
    assert not any("is_text" in row for row in server.log)
    assert not any("red boat" in str(row) or "secret" in str(row) for row in server.log)


@pytest.fixture(scope="module")
def workers(folder):
    """Two workers, with the address of their server and what they answer to a red boat."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ServerProcess(folder, "--workers", 2, port=port)
    server.url = f"http://127.0.0.1:{port}"
    try:
        wait_until(server, lambda: len(ready(server)) == 2)
        server.expected = [[label._asdict() for label in XMCModel.from_pretrained(folder).predict("a red boat")]]
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def is_running(pid):
    """Return whether a process runs. Its parent may read its exit code much later: after its last ping times out."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ready(server):
    """Return the process ids of the workers that have started, dead ones among them."""
    started = [row["message"] for row in server.log if row["message"].startswith("Started server process")]
    complete = sum("startup complete" in row["message"] for row in server.log)
    return [int(message.split("[")[1].rstrip("]")) for message in started] if len(started) == complete else []


def wait_until(server, holds):
    deadline = time.monotonic() + 240
    while not holds():
        assert server.process.poll() is None, server.log
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


def ask_on_new_connections(server, number):
    for _ in range(number):  # either worker may accept each
        answer = requests.post(f"{server.url}/predict", json={"texts": "a red boat"}, timeout=60)
        assert answer.json()["predictions"] == server.expected


@pytest.mark.slow
def test_workers_share_a_port_and_count_together(workers):
    ask_on_new_connections(workers, 40)
    assert "hf_xmc_texts_total 40.0" in requests.get(f"{workers.url}/metrics", timeout=60).text
    assert requests.get(f"{workers.url}/health", timeout=60).json()["model"] == "my-boats"


@pytest.mark.slow
def test_workers_share_the_embeddings_in_memory(workers):
    for worker in ready(workers):
        maps = psutil.Process(worker).memory_maps()
        (embeddings,) = (one for one in maps if one.path.endswith("label_index/embeddings.safetensors"))
        assert embeddings.rss > 0
        assert (embeddings.private_dirty, embeddings.swap) == (0, 0)  # no copy of its own


@pytest.mark.slow
def test_a_killed_worker_loses_only_its_own_requests_and_is_replaced(workers):
    body = json.dumps({"texts": "a red boat"}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    first, last = head.encode() + b"Content-Type: application/json\r\n\r\n" + body[:5], body[5:]
    port, clients = int(workers.url.rpartition(":")[2]), []
    killed, other = before = ready(workers)

    def held_by(worker):
        """Return the clients whose request a worker has begun to read."""
        remote = {one.raddr.port for one in psutil.Process(worker).net_connections("tcp") if one.raddr}
        return [client for client in clients if client.getsockname()[1] in remote]

    while len(clients) < 200 and not (len(held_by(killed)) > 2 and len(held_by(other)) > 2):
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        clients[-1].sendall(first)
    wait_until(workers, lambda: len(held_by(killed)) + len(held_by(other)) == len(clients))
    lost, kept = held_by(killed), held_by(other)
    assert len(lost) > 2
    assert len(kept) > 2
    os.kill(killed, signal.SIGKILL)
    for client in lost:
        with suppress(ConnectionError):
            client.sendall(last)
            assert client.recv(1) == b"", "a killed worker has answered"
    for client in kept:
        client.sendall(last)
        answer = HTTPResponse(client)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["predictions"]) == (200, workers.expected)
    ask_on_new_connections(workers, 10)  # while the new worker starts
    wait_until(workers, lambda: len(ready(workers)) == 3)
    assert f"Child process [{killed}] died" in [row["message"] for row in workers.log]
    new = ready(workers)[2]
    assert new not in before
    os.kill(other, signal.SIGKILL)
    wait_until(workers, lambda: not is_running(other))  # only the new one is left to answer
    ask_on_new_connections(workers, 10)
    for client in clients:
        client.close()


@pytest.mark.slow
def test_stopped_workers_end_with_their_parent(workers):
    children = psutil.Process(workers.process.pid).children(recursive=True)
    assert len(children) >= 2
    assert workers.stop() == 0
    assert psutil.wait_procs(children, timeout=150)[1] == []
    texts = [row["message"] for row in workers.log if "is_text" in row]
    assert not [text for text in texts if "resource_tracker" not in text]  # Python on the killed worker


@pytest.mark.parametrize("workers", [1, 2])
def test_each_process_loads_the_model_as_asked(folder, workers, monkeypatch):
    loaded, load = [], XMCModel.from_pretrained
    monkeypatch.setattr(XMCModel, "from_pretrained", lambda name, **how: loaded.append(how) or load(name, **how))
    monkeypatch.setattr("uvicorn.run", lambda app, **options: worker_app() if options.get("factory") else None)
    for variable in (SHARED, WORKER, "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # restored after the test
    for arguments, verify in (([], True), (["--no-verify"], False)):
        assert main(["serve", str(folder), "--workers", str(workers), "--device", "cpu", *arguments]) == 0
        wanted = {"device": "cpu", "verify": verify, "backend": "torch", "model_kwargs": None}
        assert loaded == [wanted] * workers  # the parent, and one worker
        loaded.clear()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--workers", "0"], "`workers` must be at least 1, got 0"),
        (["--max_texts", "0"], "`max_texts` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_loads(arguments, error, capsys):
    assert main(["serve", "no such folder", *arguments]) == 1
    assert error in capsys.readouterr().err


def test_a_missing_model_is_refused_before_the_server_starts(capsys, tmp_path):
    assert main(["serve", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
