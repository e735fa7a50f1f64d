"""Annif's own client, and the requests of its ``http`` backend, against a real server."""

import pytest
import requests
from annif_client import AnnifClient
from helpers.server import TEXTS, make_model, running
from helpers.tiny import LABELS, make_static_encoder

from hf_xmc import XMCModel


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def url(model):
    with running(model, name="boats", max_characters=200_000, batch_wait_ms=0) as url:
        yield f"{url}/v1/"


@pytest.fixture
def client(url):
    return AnnifClient(url)


def suggestions(labels):
    return [
        {"uri": label.uid, "label": label.text, "notation": None, "score": label.score}
        for label in labels
        if label.score > 0
    ]


def test_the_client_lists_the_project(client):
    assert client.api_info["title"] == "hf_xmc"
    (about,) = client.projects
    assert about == client.get_project("boats")
    assert (about["project_id"], about["language"], about["is_trained"]) == ("boats", "en", True)
    assert about["vocab"] == {"vocab_id": "boats", "languages": ["en"], "size": len(LABELS), "loaded": True}


def test_the_client_gets_the_labels_of_a_text(client, model):
    assert client.suggest("boats", "a red boat") == suggestions(model.predict("a red boat", top_k=10))
    assert client.suggest("boats", "a red boat", limit=1) == suggestions(model.predict("a red boat", top_k=1))
    assert client.suggest("boats", "a red boat", limit=0) == client.suggest("boats", " ") == []
    above = client.suggest("boats", "a red boat", threshold=0.5)
    assert above == suggestions(model.predict("a red boat", top_k=10, threshold=0.5))
    assert len(above) == 1
    assert len(client.suggest("boats", "a red boat", limit=1000)) > 1


def test_the_client_gets_the_labels_of_several_texts(client, model):
    documents = [{"text": text, "document_id": f"d{number}"} for number, text in enumerate(TEXTS)]
    answers = client.suggest_batch("boats", [*documents, {"text": "a car"}], limit=3, threshold=0.2)
    assert [answer["document_id"] for answer in answers] == [*(row["document_id"] for row in documents), None]
    expected = model.predict([*TEXTS, "a car"], top_k=3, threshold=0.2)
    assert [answer["results"] for answer in answers] == [suggestions(labels) for labels in expected]


def test_the_client_is_told_of_an_unknown_project(client):
    for ask in (
        client.get_project,
        lambda name: client.suggest(name, "a"),
        lambda name: client.suggest_batch(name, []),
    ):
        with pytest.raises(ValueError, match="project 'cars' not found; the server has 'boats'"):
            ask("cars")


def test_the_requests_of_the_http_backend_are_answered(url, model):
    endpoint = f"{url}projects/boats/suggest"
    about = requests.get(endpoint.replace("/suggest", ""), timeout=60)
    assert (about.json()["is_trained"], about.json()["modification_time"]) == (True, None)
    data = {"text": "a red boat", "metadata_title": "x", "project": "boats", "limit": 100}
    assert requests.post(endpoint, data=data, timeout=60).json()["results"] == suggestions(
        model.predict("a red boat", top_k=100)
    )


def test_a_long_text_in_letters_of_several_bytes_is_read(url, model):
    text = "a red boat " + "ü" * 190_000  # more than a megabyte in a form
    assert AnnifClient(url).suggest("boats", text) == suggestions(model.predict(text, top_k=10))


@pytest.mark.parametrize(
    ("form", "detail"),
    [
        ({"limit": 3}, "`text` must be given, and is missing."),
        (
            {"text": "a", "limit": "x"},
            "`limit` must be a valid integer, unable to parse string as an integer, got 'x'.",
        ),
        ({"text": "a", "threshold": 2}, "`threshold` must be less than or equal to 1, got '2'."),
        ({"text": "a", "language": "fi"}, "`language` must be 'en', got 'fi'."),
        ({"text": "a" * 200_001}, "`texts.0` must have at most 200000 characters, got 200001."),
    ],
)
def test_a_wrong_form_is_a_bad_request(url, form, detail):
    answer = requests.post(f"{url}projects/boats/suggest", data=form, timeout=60)
    assert (answer.status_code, answer.json()["detail"]) == (400, detail)


def test_a_file_as_text_and_documents_without_text_are_bad_requests(url):
    file = requests.post(f"{url}projects/boats/suggest", files={"text": ("a.txt", b"a")}, timeout=60)
    assert file.status_code == 400
    assert file.json()["detail"].startswith("`text` must be a valid string, got")
    batch = requests.post(f"{url}projects/boats/suggest-batch", json={"documents": [{}]}, timeout=60)
    assert (batch.status_code, batch.json()["detail"]) == (400, "`documents.0.text` must be given, and is missing.")


def test_a_model_without_probabilities_is_unavailable():
    with running(XMCModel(make_static_encoder(), LABELS)) as url:
        client = AnnifClient(f"{url}/v1/")
        assert client.get_project("model")["is_trained"] is False
        answer = requests.post(f"{url}/v1/projects/model/suggest", data={"text": "a"}, timeout=60)
        assert answer.status_code == 503
        assert "the model must be calibrated" in answer.json()["detail"]
