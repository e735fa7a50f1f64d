"""The page for browsers, through the calls that its buttons make."""

import csv
import re
from pathlib import Path

import pytest
import requests
from gradio_client import Client, handle_file
from helpers.server import make_model, running

from hf_xmc.serving.app import create_app
from hf_xmc.serving.logs import JsonFormatter
from hf_xmc.serving.settings import ServerSettings


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def url(model):
    with running(model, with_page=True, name="boats", max_texts=5, batch_wait_ms=0) as url:
        yield url


@pytest.fixture(scope="module")
def browser(url):
    return Client(url, verbose=False, analytics_enabled=False)


def test_the_first_page_is_the_page_and_the_api_stays(url):
    first = requests.get(url, headers={"Accept": "text/html,*/*;q=0.8"}, timeout=60)
    assert (first.status_code, first.history) == (200, [])
    assert "hf_xmc: boats" in first.text
    assert not re.findall(r"fonts\.googleapis", first.text)
    assert requests.get(f"{url}/health", timeout=60).json()["status"] == "ok"
    wrong = requests.get(f"{url}/predict", timeout=60)
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    unknown = requests.get(f"{url}/nothing", timeout=60)
    assert (unknown.status_code, unknown.headers["Content-Type"]) == (404, "application/problem+json")
    assert requests.get(f"{url}/page", timeout=60).url == f"{url}/"


@pytest.mark.parametrize("with_page", [True, False])
def test_a_client_of_the_api_is_told_where_it_is_described(model, with_page):
    with running(model, with_page=with_page, name="boats") as url:
        about = requests.get(url, headers={"Accept": "application/json"}, timeout=60).json()
        assert about == {"model": "boats", "docs": "/docs", "openapi": "/openapi.json"}
        described = requests.get(url + about["openapi"], timeout=60).json()
        assert ("/page" in described["paths"], "/predict" in described["paths"]) == (False, True)


def test_a_text_gets_labels_with_their_words_and_similar_texts(browser, model):
    bars, table, _, words, nearest = browser.predict("a red boat", 2, None, None, api_name="/predict")
    expected = model.predict("a red boat", top_k=2)
    assert table["data"] == [list(label) for label in expected]
    assert [bar["label"] for bar in bars["confidences"]] == [label.text for label in expected]
    explanation = model.explain("a red boat", expected[0].uid)
    assert "".join(part["token"] for part in words) == "a red boat"
    heaviest = max(explanation.words, key=lambda word: word.weight).text
    assert max(words, key=lambda part: part["class_or_confidence"] or 0)["token"] == heaviest
    assert [row[1] for row in nearest["data"]] == [text.text for text in explanation.nearest]


def test_labels_are_chosen_and_left_out_by_uid(browser, model):
    uids = [f"http://example.org/{name}" for name in ("red", "boat")]
    table = browser.predict("a red boat", 5, "\n".join(uids), uids[0], api_name="/predict")[1]
    assert [row[0] for row in table["data"]] == uids[1:]
    with pytest.raises(Exception, match="uid 'nothing' is not one of the 11 labels"):
        browser.predict("a red boat", 5, "nothing", "", api_name="/predict")


def test_a_file_of_texts_gives_a_table(browser, model, tmp_path):
    (tmp_path / "texts.txt").write_text('a red boat\n\na "car", blue\n')
    written = browser.predict(handle_file(tmp_path / "texts.txt"), 2, "", "", api_name="/predict_file")
    with Path(written).open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["text", "predicted_uids", "predicted_labels", "predicted_scores"]
    texts = ["a red boat", "", 'a "car", blue']
    assert [row[0] for row in rows] == texts
    assert [row[2] for row in rows] == ["; ".join(label.text for label in found) for found in model.predict(texts, 2)]
    (tmp_path / "texts.txt").write_text("a\n" * 6)
    with pytest.raises(Exception, match="`texts` must be at most 5 texts, got 6"):
        browser.predict(handle_file(tmp_path / "texts.txt"), 2, "", "", api_name="/predict_file")


def test_an_error_of_the_model_is_shown_and_logged_without_a_text(caplog, capfd):
    broken = make_model()

    def predict(texts, **options):
        raise RuntimeError(f"cannot read {texts}")

    broken.predict = predict
    with running(broken, with_page=True) as url, pytest.raises(Exception, match="the server failed to answer"):
        Client(url, verbose=False, analytics_enabled=False).predict("a secret", 2, "", "", api_name="/predict")
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("hf_xmc")]
    assert any('"RuntimeError"' in line for line in lines)
    assert "secret" not in "".join([*lines, *capfd.readouterr()])


def test_a_page_with_a_token_is_refused(model):
    with pytest.raises(ValueError, match="`with_page` must be False with a token"):
        create_app(model, ServerSettings(token="secret"), with_page=True)
