"""Malformed, huge, slow and concurrent bad requests: a clear refusal, never a status of 500, and the server stays."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import schemathesis
from helpers.server import make_model, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

LIMITS = {"max_texts": 20, "max_characters": 500, "max_body_bytes": 20_000, "batch_wait_ms": 0}
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/labels"),
    ("GET", "/metrics"),
    ("POST", "/predict"),
    ("GET", "/v1/"),
    ("GET", "/v1/projects"),
    ("GET", "/v1/projects/{project_id}"),
    ("POST", "/v1/projects/{project_id}/suggest"),
    ("POST", "/v1/projects/{project_id}/suggest-batch"),
]
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
AT_ONCE = 4
HOW = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def url():
    with running(make_model(), **LIMITS) as url:
        yield url


def described(url):
    """Load the description of a server. A body that breaks it may also be too long, which is refused first, by 413."""
    config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}}})
    return schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)


@pytest.fixture(scope="module")
def api(url):
    return described(url)


@pytest.fixture(autouse=True)
def server_answers_afterwards(url, caplog):
    yield
    assert requests.post(f"{url}/predict", json={"texts": "a red boat"}, timeout=60).status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_every_operation_is_tested(api):
    found = [operation.ok() for operation in api.get_all_operations()]
    assert sorted((operation.method.upper(), operation.path) for operation in found) == sorted(OPERATIONS)


def test_a_wrong_body_that_is_too_long_counts_as_refused():
    with running(make_model(), **LIMITS | {"max_body_bytes": 1}) as url:
        statuses = set()

        @settings(max_examples=20, **HOW)
        @given(case=described(url)["/predict"]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def send(case):
            answer = case.call(base_url=url, timeout=60)
            case.validate_response(answer, checks=CHECKS)
            statuses.add(answer.status_code)

        send()
    assert 413 in statuses
    assert statuses <= {400, 413, 422}


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{method} {path}" for method, path in OPERATIONS])
def test_generated_requests_sent_at_once_get_an_answer_as_described(api, url, method, path, examples):
    case = st.one_of(
        api[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE),
        api[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE),
    )
    statuses = set()

    @settings(max_examples=examples, **HOW)
    @given(cases=st.lists(st.tuples(case, st.booleans()), min_size=AT_ONCE, max_size=AT_ONCE))
    def send(cases):
        for one, known in cases:
            if known and "project_id" in one.path_parameters:
                one.path_parameters["project_id"] = "model"
        with ThreadPoolExecutor(AT_ONCE) as clients:
            answers = list(clients.map(lambda one: one[0].call(base_url=url, timeout=60), cases))
        for (one, _), answer in zip(cases, answers, strict=True):
            one.validate_response(answer, checks=CHECKS)
            statuses.add(answer.status_code)

    send()
    assert 200 in statuses
    assert method == "GET" or statuses & {400, 422}


@pytest.mark.parametrize(
    "body",
    [
        b'{"texts": "a", "top_k": ' + b"9" * 5000 + b"}",  # more digits than Python converts
        b'{"texts": "a", "threshold": 1e999}',
        b'{"texts": "a", "threshold": NaN}',
        b'{"texts": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b'{"texts": "a", ' + b'"top_k": 1, ' * 1000 + b'"top_k": "x"}',
        b"\xff" * 100,
        b"\0" * 100,
    ],
    ids=lambda body: repr(body[:25]),
)
@pytest.mark.parametrize("path", ["/predict", "/v1/projects/model/suggest-batch"])
def test_a_body_that_is_not_meant_is_refused(url, path, body):
    answer = requests.post(url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"no part at all"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\na'),
        ("application/x-www-form-urlencoded", b"&".join(b"a=b" for _ in range(2000))),
        ("application/x-www-form-urlencoded", b"text=%ff%00&limit=1e9"),
        ("application/json", b'{"text": "a"}'),
    ],
)
def test_a_form_that_is_not_meant_is_refused(url, content_type, body):
    answer = requests.post(
        f"{url}/v1/projects/model/suggest", data=body, headers={"Content-Type": content_type}, timeout=60
    )
    assert answer.status_code == 400
    assert answer.json()["detail"]


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connected(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def received(client):
    """Return all that a server sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # a client that expects TLS
        b"GARBAGE\r\n\r\n",
        b"GET " + b"/a" * 50_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}",
    ],
    ids=lambda sent: repr(sent[:20]),
)
def test_bytes_that_are_not_http_are_refused(url, sent):
    with connected(url) as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server has refused it already
        answer = received(client)
    assert answer == b"" or answer.split()[1].startswith(b"4"), answer[:200]


def test_clients_that_never_finish_are_refused_and_others_are_served():
    with running(make_model(), max_body_seconds=0.5) as url:
        parts = [b"P", HEAD, HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b"Content-Length: 100\r\n\r\n{"] * 25
        clients = [connected(url) for _ in parts]
        for client, part in zip(clients, parts, strict=True):
            client.sendall(part)
        for _ in range(5):
            assert requests.post(f"{url}/predict", json={"texts": "a red boat"}, timeout=60).status_code == 200
        for client, part in zip(clients, parts, strict=True):
            if part.count(b"\r\n\r\n"):  # the body is missing
                head, _, body = received(client).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 408")
                assert json.loads(body)["detail"] == "the body must arrive within 0.5 seconds."
            client.close()
