"""The metrics load through ``evaluate``, from the package and from Spaces of the Hub."""

import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.sparse as sp

from hf_xmc import metrics
from hf_xmc.metrics.hf_evaluate import MODULES, metric_path

PREDICTIONS, REFERENCES = [[4, 1, 0], [2], [3, 0, 2]], [[0, 4], [], [1, 2, 3, 0]]
WORTH = [1.0, 2.0, 3.0, 4.0, 5.0]
CODE = """
import json, sys, evaluate
predictions, references, worth, sources = json.loads(sys.argv[1])
found = {source: {} for source in sources}
for source, name in [(source, name) for source, names in sources.items() for name in names]:
    module = evaluate.load(name)
    extra = {"inverse_propensity": worth} if "_ps" in name else {}
    module.add_batch(predictions=predictions[:1], references=references[:1])
    module.add_batch(predictions=predictions[1:], references=references[1:])
    found[source] |= module.compute(k=2, **extra)
print(json.dumps(found))
"""


class Spaces(http.server.BaseHTTPRequestHandler):
    """``/spaces/org/NAME/resolve/REVISION/FILE``, as the Hub answers it."""

    def do_GET(self):
        *_, name, resolve, _, file = self.path.split("?")[0].split("/")
        path = MODULES / name / file
        found = resolve == "resolve" and path.is_file()
        body = path.read_bytes() if found else b"Entry not found"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Spaces)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def expected():
    label_ids = np.array([[4, 1], [2, -1], [3, 0]])
    relevance = sp.csr_array(np.array([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]))
    return {
        "P@2": metrics.precision_at_k(label_ids, relevance, 2),
        "PSP@2": metrics.psp_at_k(label_ids, relevance, WORTH, 2),
        "nDCG@2": metrics.ndcg_at_k(label_ids, relevance, 2),
        "R@2": metrics.recall_at_k(label_ids, relevance, 2),
        "PSnDCG@2": metrics.psndcg_at_k(label_ids, relevance, WORTH, 2),
        "PSR@2": metrics.psr_at_k(label_ids, relevance, WORTH, 2),
    }


def test_evaluate_modules_load_from_the_package_and_from_spaces(endpoint, tmp_path):
    names = ["xmc_precision", "xmc_psp", "xmc_ndcg", "xmc_recall", "xmc_psndcg", "xmc_psr"]
    sources = {"path": [metric_path(name) for name in names], "space": [f"org/{name}" for name in names]}
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_EVALUATE_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    arguments = json.dumps([PREDICTIONS, REFERENCES, WORTH, sources])
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {source: pytest.approx(expected()) for source in sources}


def test_unknown_metric_is_refused():
    with pytest.raises(
        ValueError,
        match="must be one of xmc_ndcg, xmc_precision, xmc_psndcg, xmc_psp, xmc_psr, xmc_recall, got 'xmc_f1'",
    ):
        metric_path("xmc_f1")
