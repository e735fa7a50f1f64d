"""A report is one file that anyone can read: it holds no markup of the data, and each image has a name."""

import base64
import json
import shlex
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.finished_run import EVALUATIONS, LOSSES, finished, make_data
from helpers.tiny import LABELS, POSITIVES, make_bert_encoder

from hf_xmc import XMCData
from hf_xmc.experiment.baselines import measure_baselines
from hf_xmc.experiment.report import write_report

HOSTILE = "</p><script>alert('boat')</script><img src=x onerror=alert(1)> & \"red\" {{ 7 * 7 }}"
DECILE = {"num_labels": 2, "num_positives": 4, "precision": 0.1}
ONES = {**DECILE, "min_count": 1, "max_count": 1}


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.words, self.text = [], [], [], ""
        self.feed(source)
        assert not self.open
        self.text = " ".join("".join(self.words).split())
        self.spaced = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def report(folder, data, name="boats", **settings):
    return Page(write_report(folder, data, name, **settings).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on data of its own, which no test changes."""
    folder, data = tmp_path_factory.mktemp("run"), make_data()
    model, metrics = finished(folder, data)
    return types.SimpleNamespace(folder=folder, data=data, model=model, metrics=metrics, page=report(folder, data))


@pytest.fixture
def changed(run, tmp_path):
    """The same run with another history or other metrics."""

    def change(history, **metrics):
        (tmp_path / "model").symlink_to(run.folder / "model")
        (tmp_path / "metrics.json").write_text(json.dumps({**run.metrics, **metrics}, default=str))
        (tmp_path / "history.json").write_text(json.dumps(history))
        return report(tmp_path, run.data)

    return change


def test_markup_in_texts_labels_and_names_is_shown_and_not_obeyed(tmp_path):
    texts = [f"{HOSTILE} {number} boat" for number in range(13)]
    data = make_data([*LABELS[:-2], HOSTILE, HOSTILE + "!"], texts)
    finished(tmp_path, data)
    page = report(tmp_path, data, HOSTILE)
    assert not page.all("script")
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 3  # the name, an example and a label
    assert "49" not in page.text.split("10 test texts")[1].split("alert")[1]


def test_the_page_needs_no_other_file(run):
    page = run.page
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "history.json",
        "metrics.json",
        "model",
        "report.html",
    ]
    addresses = [attributes[name] for _, attributes in page.elements for name in ("src", "href") if name in attributes]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "<svg" in base64.b64decode(addresses[0].split(",")[1]).decode()


def test_images_tables_and_marks_have_names_for_those_who_do_not_see(run):
    page = run.page
    assert ("html", {"lang": "en"}) in page.elements
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    alts = [image["alt"] for image in page.all("img")]
    assert alts[0] == "The training loss goes from 8 to 5 in 2 epochs."
    assert alts[1].startswith("In training, P@1 from 50.0 to 50.0, P@5 from")
    assert all(head.get("scope") in ("row", "col") for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 3
    marks = {mark["aria-label"] for mark in page.all("span") if mark.get("class") == "mark"}
    assert marks <= {"correct", "incorrect", "missed"}
    assert "correct" in marks


def test_every_metric_has_a_sentence_and_stands_next_to_baselines(run):
    metrics = run.metrics
    page = run.page
    assert f"{100 * metrics['memory']['P@1']:.0f} of 100 texts" in page.text
    assert "Measure This model Most frequent labels Most similar training texts P@1 How often the" in page.spaced
    baselines = measure_baselines(run.data, "test")
    row = page.spaced.split("How often the first label is correct. ")[1].split()[:3]
    own = [system["P@1"] for system in (metrics["memory"], *baselines.values())]
    assert row == [f"{100 * value:.1f}" for value in own]
    size = [min(len(ids), 5) for ids in POSITIVES if ids]
    assert f"At most {100 * np.mean(size) / 5:.1f} here" in page.text


def test_labels_that_are_missed_stand_next_to_those_that_are_found(tmp_path):
    data = make_data([*LABELS[:9], "plant nobody finds", LABELS[10]])
    model, _ = finished(tmp_path, data, memory=False)
    page = report(tmp_path, data)
    found = model.search(list(data.test["text"]), 5).label_ids
    missed = sum(label not in found[row] for row, ids in enumerate(POSITIVES) for label in ids)
    assert missed
    shown = [mark["aria-label"] for mark in page.all("span") if mark.get("class") == "mark"]
    right = sum(label in found[row] for row, ids in enumerate(POSITIVES) for label in ids)
    assert shown.count("correct") <= right
    assert 0 < shown.count("missed") <= missed


def test_scores_are_shown_as_probabilities_or_not_at_all(run, tmp_path):
    probabilities = [span for span in run.page.all("span") if span.get("class") == "probability"]
    assert len(probabilities) == 50
    assert "A percentage is how sure the model is." in run.page.text
    alone = XMCData(run.data.train, run.data.labels, test=run.data.test)
    finished(tmp_path, alone, validation_size=0)
    page = report(tmp_path, alone)
    assert not [span for span in page.all("span") if span.get("class") == "probability"]
    assert "The model is not calibrated" in page.text


def test_three_commands_name_the_model_and_survive_a_shell(tmp_path):
    folder = tmp_path / "my runs $HOME"
    folder.mkdir()
    texts = [f'it\'s "a" `boat` $(here) {number}' for number in range(13)]
    data = make_data(texts=texts)
    finished(folder, data)
    page = report(folder, data)
    lines = ["hf-xmc " + part.split(" Label a")[0] for part in page.text.split("hf-xmc ")[1:]]
    words = [shlex.split(line.split(" Measure it")[0]) for line in lines]
    assert [line[1:3] for line in words] == [
        [name, str(folder / "model")] for name in ("predict", "predict", "evaluate")
    ]
    assert words[0][3:] == [texts[0], "--explain"]
    assert words[2][3] == "my data/it's"


@pytest.mark.parametrize(
    ("history", "images"),
    [([{"epoch": 8.0, "train_loss": 4.0, "step": 16}], 0), ([*EVALUATIONS], 1), ([*LOSSES], 1), ([LOSSES[0]], 0)],
)
def test_a_plot_without_a_curve_is_left_out(changed, history, images):
    assert len(changed(history, deciles=[]).all("img")) == images


def test_groups_of_one_frequency_are_one_bar(changed):
    deciles = [{**ONES, "recall": 0.2}, {**ONES, "recall": 0.4}, {**ONES, "max_count": 7, "recall": 0.9}]
    (image,) = changed([], deciles=deciles).all("img")
    assert image["alt"] == (
        "Correct labels found: 30 percent of those with 1 training texts, 90 percent of those with 1–7."
    )


def test_words_that_speak_for_a_label_are_marked(run):
    page = run.page
    assert "because of: boat" in page.text
    assert page.all("mark")


def test_an_encoder_that_is_not_static_explains_the_first_label(tmp_path, bert_folder):
    data = make_data()
    finished(tmp_path, data, make_bert_encoder(bert_folder))
    page = report(tmp_path, data)
    assert 0 < page.text.count("because of: ") <= 10
