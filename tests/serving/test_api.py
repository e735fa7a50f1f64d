"""The JSON API of a real server."""

import json
import logging
import re

import pytest
import requests
from helpers.server import TEXTS, make_model, running
from helpers.tiny import LABELS, make_static_encoder

from hf_xmc import XMCModel
from hf_xmc.serving.app import create_app
from hf_xmc.serving.logs import JsonFormatter
from hf_xmc.serving.settings import ServerSettings

LIMITS = {"max_texts": 20, "max_characters": 100, "max_body_bytes": 5000, "batch_wait_ms": 0}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def url(model):
    with running(model, **LIMITS) as url:
        yield url


def post(url, body, **headers):
    return requests.post(f"{url}/predict", json=body, headers=headers, timeout=60)


def rows(predictions):
    return [[label._asdict() for label in labels] for labels in predictions]


def test_predict_equals_the_model_bit_for_bit(url, model):
    assert post(url, {"texts": TEXTS}).json() == {"predictions": rows(model.predict(TEXTS))}
    uids = [f"http://example.org/{name}" for name in ("red", "boat", "blue")]
    options = {"top_k": 2, "threshold": 0.1, "allow": uids, "deny": uids[:1]}
    expected = rows(model.predict(TEXTS, **options))
    assert {label["uid"] for labels in expected for label in labels} == {*uids[1:]}
    assert post(url, {"texts": TEXTS, **options}).json()["predictions"] == expected


def test_predict_takes_a_single_text_a_blank_one_and_none(url, model):
    assert post(url, {"texts": "a red boat"}).json()["predictions"] == rows([model.predict("a red boat")])
    assert post(url, {"texts": [" "]}).json()["predictions"] == [[]]
    assert post(url, {"texts": []}).json()["predictions"] == []


def test_explain_adds_the_words_and_the_nearest_texts(url, model):
    ((label,),) = post(url, {"texts": "a red boat", "top_k": 1, "explain": True}).json()["predictions"]
    expected = model.explain("a red boat", label["uid"])
    assert label["words"] == [word._asdict() for word in expected.words]
    assert label["nearest"] == [text._asdict() for text in expected.nearest]
    assert label["words_add_up"]
    many = post(url, {"texts": ["a"] * 17, "explain": True})
    assert many.status_code == 422
    assert many.json()["detail"].startswith("`texts` must be at most 16 texts with `explain`, got 17")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "`texts` must be given, and is missing."),
        ([], "`body` must be a JSON object, got []."),
        ({"texts": 3}, "`texts` must be a valid list, got 3."),
        ({"texts": ["a", None]}, "`texts.1` must be a valid string, got None."),
        ({"texts": ["a"] * 21}, "`texts` must be at most 20 texts, got 21. Send several requests."),
        ({"texts": ["a", "a" * 101]}, "`texts.1` must have at most 100 characters, got 101."),
        ({"texts": ["\ud800"]}, "`texts.0` must be valid Unicode, got half of a surrogate pair."),
        ({"texts": "a", "deny": ["\udfff"]}, "`deny.0` must be valid Unicode, got half of a surrogate pair."),
        ({"texts": "a", "top_k": 0}, "`top_k` must be greater than or equal to 1, got 0."),
        ({"texts": "a", "top_k": 201}, "`top_k` must be less than or equal to 200, got 201."),
        ({"texts": "a", "top_k": True}, "`top_k` must be a valid integer, got True."),
        ({"texts": "a", "threshold": 1.5}, "`threshold` must be less than or equal to 1, got 1.5."),
        ({"texts": "a", "allow": ["nothing"]}, "uid 'nothing' is not one of the 11 labels."),
        ({"texts": [], "allow": ["nothing"]}, "uid 'nothing' is not one of the 11 labels."),
        ({"texts": "a", "topk": 3}, "`topk` is not a known argument."),
    ],
)
def test_a_wrong_argument_is_refused_by_name(url, body, detail):
    answer = post(url, body)
    assert (answer.status_code, answer.json()["detail"]) == (422, detail)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 422


@pytest.mark.parametrize("body", [b"{", b'{"texts": ["a"]', b"\xff\xfe", b"[" * 4900, b'{"texts": "a"}\x00', b""])
def test_malformed_json_is_refused(url, body):
    answer = requests.post(f"{url}/predict", data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_large_body_is_refused_with_and_without_its_size(url):
    headers, parts = {"Content-Type": "application/json"}, [b" " * 1000] * 6
    for body in (b"".join(parts), iter(parts)):
        answer = requests.post(f"{url}/predict", data=body, headers=headers, timeout=60)
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("the body must be at most 5000 bytes, got 6000 or more")
    assert requests.post(f"{url}/predict", data=iter(parts[:4]), headers=headers, timeout=60).status_code == 422


def test_a_threshold_needs_a_calibrated_model():
    with running(XMCModel(make_static_encoder(), LABELS)) as url:
        answer = post(url, {"texts": "a", "threshold": 0.5})
        assert answer.status_code == 422
        assert "scores are not calibrated yet" in answer.json()["detail"]
        assert not requests.get(f"{url}/health", timeout=60).json()["calibrated"]


def test_an_error_of_the_model_is_a_500_without_a_text(caplog):
    model = make_model()

    def broken(texts, **options):
        raise RuntimeError(f"cannot read {texts}")

    model.predict = broken
    with running(model) as url:
        answer = post(url, {"texts": "a secret"})
        assert answer.status_code == 500
        assert answer.json()["detail"] == "the server failed to answer; its log has more."
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any('"RuntimeError"' in line and '"frames"' in line for line in lines)
    assert not any("secret" in line for line in lines)


def test_labels_by_prefix_in_any_case(url):
    found = requests.get(f"{url}/labels", params={"prefix": "B"}, timeout=60).json()
    assert [label["text"] for label in found["labels"]] == ["boat", "blue"]
    assert found["labels"][0]["uid"] == "http://example.org/boat"
    first = requests.get(f"{url}/labels", params={"limit": 3}, timeout=60).json()
    assert [label["text"] for label in first["labels"]] == LABELS[:3]
    assert first["total"] == len(LABELS)
    wrong = requests.get(f"{url}/labels", params={"limit": 1001}, timeout=60)
    assert wrong.json()["detail"] == "`limit` must be less than or equal to 1000, got '1001'."


def test_health_and_the_description_of_the_api(url):
    health = requests.get(f"{url}/health", timeout=60).json()
    assert (health["status"], health["num_labels"], health["calibrated"]) == ("ok", 11, True)
    assert requests.get(url, timeout=60).url == f"{url}/docs"
    paths = requests.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    assert {"/predict", "/labels", "/health", "/metrics", "/v1/projects/{project_id}/suggest"} <= set(paths)
    assert set(paths["/predict"]["post"]["responses"]) == {"200", "400", "401", "408", "413", "422", "503"}


def test_metrics_count_requests_errors_texts_and_batches():
    def metric(name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", requests.get(f"{url}/metrics", timeout=60).text, flags=re.M)
        return None if found is None else float(found[1])

    with running(make_model()) as url:
        for number in (1, 3):
            post(url, {"texts": ["a red boat"] * number})
        post(url, {"texts": 0})
        requests.get(f"{url}/nothing/here", timeout=60)
        ok, wrong = (f'{{method="POST",route="/predict",status="{status}"}}' for status in (200, 422))
        assert metric(f"hf_xmc_requests_total{ok}") == 2
        assert metric(f"hf_xmc_requests_total{wrong}") == metric(f"hf_xmc_errors_total{wrong}") == 1
        assert metric(f"hf_xmc_errors_total{ok}") is None
        assert metric('hf_xmc_errors_total{method="GET",route="unmatched",status="404"}') == 1
        assert metric("hf_xmc_texts_total") == metric("hf_xmc_batch_texts_sum") == 4
        assert metric("hf_xmc_batch_texts_count") == 2
        assert metric('hf_xmc_request_seconds_count{route="/predict"}') == 3


@pytest.mark.parametrize("log_texts", [False, True])
def test_the_log_has_a_line_per_request_and_texts_only_if_wanted(log_texts, caplog):
    with caplog.at_level(logging.INFO), running(make_model(), log_texts=log_texts) as url:
        post(url, {"texts": ["a secret boat", "zzz"], "explain": True})
        post(url, {"texts": ["a secret boat"], "allow": ["secret uid"]})
        requests.get(f"{url}/labels?prefix=secret", timeout=60)
        requests.post(f"{url}/v1/projects/model/suggest", data={"text": "a secret"}, timeout=60)
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith(("hf", "uvi"))]
    requested = [row for row in map(json.loads, lines) if row["message"] == "request"]
    assert [(row["route"], row["status"], row.get("texts")) for row in requested] == [
        ("/predict", 200, 2),
        ("/predict", 422, 1),
        ("/labels", 200, None),
        ("/v1/projects/{project_id}/suggest", 200, 1),
    ]
    assert all(row["ms"] > 0 for row in requested)
    assert any("secret" in line for line in lines) == log_texts
    assert requested[0].get("text") == (["a secret boat", "zzz"] if log_texts else None)


def test_a_token_is_needed_everywhere_but_for_health_and_docs(model):
    with running(model, token="opensésame") as url:
        for path in ("/labels", "/metrics", "/v1/projects", "/nothing"):
            assert requests.get(url + path, timeout=60).status_code == 401
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert requests.get(url + path, timeout=60).status_code == 200
        wrong = post(url, {"texts": "a"}, Authorization="Bearer open")
        assert (wrong.status_code, wrong.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "must be `Bearer` and the token" in wrong.json()["detail"]
        for value in ("opensésame", "Basic opensésame", "", "Bearer", "Bearer opensésame x"):
            assert post(url, {"texts": "a"}, Authorization=value.encode()).status_code == 401
        assert post(url, {"texts": "a"}, Authorization="bearer opensésame".encode()).status_code == 200
        declared = requests.get(f"{url}/openapi.json", timeout=60).json()["components"]["securitySchemes"]
        assert declared["HTTPBearer"]["scheme"] == "bearer"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_texts": 0}, "`max_texts` must be at least 1, got 0"),
        ({"max_body_seconds": 0}, "`max_body_seconds` must be positive, got 0"),
        ({"batch_wait_ms": -1}, "`batch_wait_ms` must be from 0 to 60000, got -1"),
        ({"token": " "}, "HF_XMC_TOKEN must be a token, got blank text"),
    ],
)
def test_wrong_settings_are_refused(settings, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        ServerSettings(**settings)


def test_a_model_without_labels_is_refused():
    with pytest.raises(ValueError, match="`model` must have labels to predict, got none"):
        create_app(XMCModel(make_static_encoder()))
