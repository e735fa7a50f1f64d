"""The page of ``hf-xmc serve`` and the report, in a real browser."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from helpers.finished_run import finished, make_data
from helpers.server import make_model, running

from hf_xmc import XMCCard
from hf_xmc.experiment.report import write_report

pytestmark = pytest.mark.browser
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
EXAMPLE = "an old blue boat"
LONGEST = 200
SECONDS = 60  # for a page on a busy machine
NAMELESS = re.compile(r"- (button|textbox|slider|spinbutton|combobox|tab|link|grid|meter)(?! \")(?=[: \n\[])")


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium. A missing one is a failure, because a skipped test shows nothing."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("these tests need Chromium: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, timeout=1000 * SECONDS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address. The test fails if the page logs an error, or asks for something that it does not get."""
    wrong, contexts = [], []

    def open_page(address, size=DESKTOP):
        contexts.append(browser.new_context(viewport=size, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda answer: answer.status >= 400 and wrong.append(f"{answer.status} {answer.url}"))
        page.on("request", lambda request: is_elsewhere(request.url, address) and wrong.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def is_elsewhere(url, address):
    return url.startswith("http") and not url.startswith(address)


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.card = XMCCard(len(model.labels), 16, "dot", "a static encoder", example=EXAMPLE)
    return model


@pytest.fixture(scope="module")
def url(model):
    with running(model, with_page=True, name="boats", max_characters=LONGEST, batch_wait_ms=0) as url:
        yield url


def predict(page, text):
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Predict").click()


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Click to upload").click()
    chooser.value.set_files(path)
    page.get_by_role("button", name="Remove this file").or_(page.get_by_role("button", name="Clear")).first.wait_for()


def shown_labels(page):
    page.get_by_role("combobox", name="Why this label?").wait_for()
    return [row.inner_text() for row in page.get_by_role("term").all()]


def scrolls_sideways(page):
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


# The page


def test_a_pasted_text_gets_labels_and_each_is_explained(open_page, url, model):
    from playwright.sync_api import expect

    page = open_page(url)
    waiting = page.get_by_text("The labels of the text appear here")
    expect(waiting).to_be_visible()
    predict(page, "a red boat")
    expected = model.predict("a red boat")
    assert shown_labels(page) == [label.text for label in expected]
    expect(waiting).to_be_hidden()
    percent = [f"{100 * label.score:.0f}%" for label in expected]
    assert [row.inner_text() for row in page.get_by_role("definition").all()] == percent
    similar = page.get_by_role("grid", name="Similar training texts")
    for label in (expected[0], expected[1]):
        page.get_by_role("combobox", name="Why this label?").click()
        page.get_by_role("option", name=label.text, exact=True).click()
        explanation = model.explain("a red boat", label.uid)
        expect(similar).to_contain_text(explanation.nearest[0].text)
        heaviest = max(explanation.words, key=lambda word: word.weight).text
        page.wait_for_function(f"heaviest => ({REDDEST})() === heaviest", arg=heaviest)


REDDEST = """() => {
  const redness = (element) => {
    const [red, green, blue, alpha] = getComputedStyle(element).backgroundColor.match(/[\\d.]+/g).map(Number);
    return red > 200 ? (alpha ?? 1) : 0;
  };
  const words = [...document.querySelectorAll(".token.highlighted")];
  return words.length && words.reduce((best, word) => (redness(word) > redness(best) ? word : best)).innerText.trim();
}"""


def test_the_example_of_the_model_card_fills_the_field(open_page, url):
    from playwright.sync_api import expect

    page = open_page(url)
    page.get_by_role("button", name=EXAMPLE).click()
    expect(page.get_by_label("Text", exact=True)).to_have_value(EXAMPLE)


def test_a_file_gives_a_table_to_download(open_page, url, model, tmp_path):
    texts = ["a red boat", 'a "car", blue', "an old dog"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    page = open_page(url)
    page.get_by_role("tab", name="A file").click()
    upload(page, tmp_path / "texts.txt")
    page.get_by_role("button", name="Predict").click()
    with page.expect_download() as download:
        page.locator("a[download='predictions.csv']").click()
    with Path(download.value.path()).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    expected = ["; ".join(label.text for label in found) for found in model.predict(texts)]
    assert [row["predicted_labels"] for row in rows] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  ", "write or paste a text first."),
        ("§§", "the model knows no word of the text, so it predicts no label."),
        ("b" * (LONGEST + 1), f"the text must have at most {LONGEST} characters, got {LONGEST + 1}."),
    ],
)
def test_a_wrong_text_is_refused_with_a_reason(open_page, url, text, message):
    from playwright.sync_api import expect

    page = open_page(url)
    predict(page, text)
    expect(page.get_by_text(message)).to_be_visible()
    expect(page.get_by_text("The labels of the text appear here")).to_be_visible()


def test_a_wrong_file_is_refused_with_the_number_of_the_line(open_page, url, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "texts.txt").write_text(f"a boat\n{'b' * (LONGEST + 1)}\n")
    page = open_page(url)
    page.get_by_role("tab", name="A file").click()
    page.get_by_role("button", name="Predict").click()
    expect(page.get_by_text("choose a text file with one text per line first.")).to_be_visible()
    upload(page, tmp_path / "texts.txt")
    page.get_by_role("button", name="Predict").click()
    expect(page.get_by_text(f"line 2 must have at most {LONGEST} characters")).to_be_visible()


def test_a_phone_shows_the_page_without_scrolling_sideways(open_page, url):
    page = open_page(url, PHONE)
    predict(page, "a red boat " * 10)
    shown_labels(page)
    page.get_by_role("button", name="Options").click()
    page.get_by_role("button", name="Uids and exact scores").click()
    page.get_by_label("Labels to leave out").wait_for()
    assert not scrolls_sideways(page)
    page.get_by_role("tab", name="A file").click()
    page.get_by_text("Text file with one text per line").wait_for()
    assert not scrolls_sideways(page)


def test_the_keyboard_alone_is_enough(open_page, url, model):
    from playwright.sync_api import expect

    page = open_page(url)
    field = page.get_by_label("Text", exact=True)
    field.wait_for()
    press_tab_until(page, field)
    page.keyboard.type("a red boat")
    press_tab_until(page, page.get_by_role("button", name="Predict"))
    page.keyboard.press("Enter")
    expected = [label.text for label in model.predict("a red boat")]
    assert shown_labels(page) == expected
    choice = page.get_by_role("combobox", name="Why this label?")
    press_tab_until(page, choice)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(choice).not_to_have_value(expected[0])


def press_tab_until(page, wanted, most=30):
    for _ in range(most):
        page.keyboard.press("Tab")
        if wanted.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"Tab does not reach {wanted}")


def test_every_control_has_a_name_for_those_who_do_not_see(open_page, url):
    page = open_page(url)
    predict(page, "a red boat")
    shown_labels(page)
    for name in ("Options", "Uids and exact scores"):
        page.get_by_role("button", name=name).click()
    page.get_by_label("Labels to leave out").wait_for()
    described = page.locator("body").aria_snapshot()
    assert not [line for line in described.splitlines() if NAMELESS.search(f"{line}\n")]
    for control in (
        'heading "boats"',
        'textbox "Text"',
        'button "Predict"',
        'tab "A file"',
        'combobox "Why this label?"',
    ):
        assert control in described
    assert re.search(r'slider "[^"]*Number of labels"', described)


# The report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("run"), make_data()
    finished(folder, data)
    return write_report(folder, data, "boats").as_uri()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_report_shows_its_plots_and_fits_the_screen(open_page, report, size):
    page = open_page(report, size)
    images = page.locator("img").all()
    assert images
    for image in images:
        assert image.is_visible()
        assert image.get_attribute("alt")
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        assert image.bounding_box()["width"] > 200
    for details in page.locator("details").all():
        details.locator("summary").press("Enter")
        assert details.evaluate("element => element.open")
    assert not scrolls_sideways(page)
    assert not [line for line in page.locator("body").aria_snapshot().splitlines() if NAMELESS.search(f"{line}\n")]
