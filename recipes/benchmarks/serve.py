"""Load test of `hf-xmc serve` on this machine: time of a request, errors, and memory, next to `model.predict`.

    python recipes/benchmarks/serve.py --model runs/demo/model --data recipes/data/wordnet-hypernyms --requests 5000

The server is a process of its own. Clients are threads of this process, each with a connection that stays open, and
send one text per request. A first tenth of the requests warms the server up and is not counted. The clients share the
processors with the server: the times of many clients include their waiting.
"""

import argparse
import http.client
import json
import queue
import subprocess
import sys
import threading
import time

import numpy as np
import psutil

from hf_xmc.cli import HelpFormatter


class Server:
    """`hf-xmc serve` on a free port."""

    def __init__(self, model: str, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "hf_xmc.cli", "serve", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port, self.failed = 0, 0
        for line in self.process.stderr:
            if "running on" in line:
                self.port = int(json.loads(line)["message"].split("running on ")[1].split()[0].rsplit(":", 1)[1])
                break
        if not self.port:
            raise RuntimeError(f"the server did not start: exit code {self.process.wait()}.")
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        for line in self.process.stderr:
            self.failed += '"level": "ERROR"' in line

    def mebibytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def ask(port: int, texts: queue.SimpleQueue, times: list[float], errors: list[str]) -> None:
    """Send the texts of a queue, one per request, until it is empty."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while True:
        try:
            text = texts.get_nowait()
        except queue.Empty:
            return
        body, start = json.dumps({"texts": text}), time.perf_counter()
        try:
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                errors.append(str(answer.status))
        except OSError as error:
            errors.append(type(error).__name__)
            connection.close()
        times.append(1e3 * (time.perf_counter() - start))


def load(server: Server, texts: list[str], clients: int) -> dict:
    """Send each text in a request, from many clients at once."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for text in texts:
        waiting.put(text)
    times, errors = [], []
    calls, memory = server.metric("hf_xmc_batch_texts_count"), {"start": round(server.mebibytes(), 1)}
    threads = [threading.Thread(target=ask, args=(server.port, waiting, times, errors)) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for percent in (10, 50, 100):
        while len(times) * 100 < percent * len(texts) and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        memory[f"{percent} %"] = round(server.mebibytes(), 1)
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {
        **summary(times, len(texts), seconds),
        "errors": len(errors),
        "texts_per_call": round(len(texts) / (server.metric("hf_xmc_batch_texts_count") - calls), 1),
        "server_mib": memory,
    }


def summary(times: list[float], number: int, seconds: float) -> dict:
    p50, p95, p99 = (round(float(value), 2) for value in np.percentile(times, (50, 95, 99)))
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "texts_per_second": round(number / seconds)}


def in_process(model: str, texts: list[str], size: int) -> dict:
    """Call `predict` in this process with `size` texts at a time."""
    from hf_xmc import XMCModel

    loaded, times = XMCModel.from_pretrained(model, device="cpu"), []
    loaded.predict(texts[:size])
    start = time.perf_counter()
    for first in range(0, len(texts), size):
        called = time.perf_counter()
        loaded.predict(texts[first : first + size])
        times.append(1e3 * (time.perf_counter() - called))
    return summary(times, len(texts), time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="a saved model, such as recipes/demo.py leaves")
    parser.add_argument("--data", required=True, help="a data set, whose test queries are sent")
    parser.add_argument("--requests", type=int, default=5000, help="requests for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64], help="numbers of clients")
    parser.add_argument("--server", default="--device cpu", help="further arguments of `hf-xmc serve`")
    options = parser.parse_args()

    from hf_xmc import load_xmc

    queries = list(load_xmc(options.data).test["text"])
    texts = [queries[number % len(queries)] for number in range(options.requests)]
    for size in (1, 64):
        print(json.dumps({"system": "predict", "texts_at_a_time": size, **in_process(options.model, texts, size)}))
    server = Server(options.model, options.server.split())
    try:
        for clients in options.clients:
            load(server, texts[: max(1, len(texts) // 10)], clients)
            print(json.dumps({"system": "serve", "clients": clients, **load(server, texts, clients)}))
        print(json.dumps({"errors_in_the_log": server.failed}))
    finally:
        server.process.terminate()
        server.process.wait(60)


if __name__ == "__main__":
    main()
