"""The plots of the documentation are drawn from its tables, by the functions of the recipes."""

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("figures")


@pytest.fixture
def drawn(figures, script, tmp_path, monkeypatch):
    """Return the data that each recipe got to draw."""
    calls = {}
    for module, function in (("compare", "draw"), ("modes", "draw"), ("loss", "plot"), ("synthetic", "plot")):
        monkeypatch.setattr(
            script(module), function, lambda *args, name=module: calls.setdefault(name, []).append(args)
        )
    figures.main(tmp_path)
    return calls


def test_all_images_are_drawn_but_one_whose_curves_are_not_stored(drawn, figures, tmp_path):
    written = {path.name for path in tmp_path.iterdir()} | {args[-1].name for calls in drawn.values() for args in calls}
    assert written == {path.name for path in (DOCS / "images").iterdir()} - {"curves.json", "synthetic-limits.png"}
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert set(re.findall(r"\]\(\.\./images/([^)]*)\)", pages)) == written | {"synthetic-limits.png"}


def test_the_cost_of_losses_is_that_of_the_table(drawn):
    ((rows, _),) = drawn["loss"]
    assert len(rows) == 16
    assert rows[1] == {
        "loss": "decoupled",
        "labels": 4096,
        "variant": "dense",
        "times_floor": 2.03,
        "extra_mib": 48,
    }
    assert list(dict.fromkeys(row["variant"] for row in rows)) == [
        "floor",
        "dense",
        "streamed, 256 MiB",
        "streamed, 256 MiB, bf16",
    ]


def test_losses_are_compared_as_in_the_tables(drawn, script):
    ((recall, precision, _),) = drawn["compare"]
    assert list(recall) == list(script("compare").LOSSES)
    assert {len(means) for means in recall.values()} == {10}
    assert (recall["decoupled softmax"][0], recall["SoftTop-100"][-1]) == (59.77, 98.88)
    assert precision["softmax"] == [
        ("0", 67.79, 0.30),
        ("200", 70.74, 0.23),
        ("1,000", 72.44, 0.32),
        ("5,000", 72.77, 0.20),
        ("all", 72.81, 0.15),
    ]


def test_label_modes_are_compared_by_steps_and_by_steps_of_exact(drawn, script):
    ((curves, _),) = drawn["modes"]
    assert tuple(curves) == script("modes").MODES
    assert curves["exact"] == [(50, 50, 59.84), (100, 100, 64.01), (150, 150, 67.24), (200, 200, 69.09)]
    assert curves["fresh"][-1] == (200, pytest.approx(78), 69.07)
    assert curves["bank"][2] == (150, pytest.approx(16.5), pytest.approx(67.85))
    assert curves["mined"][0] == (50, pytest.approx(5), pytest.approx(53.94))


def test_the_curves_of_the_easy_positive_end_at_the_values_of_the_page(drawn, figures):
    (synthetic,) = drawn["synthetic"]
    curves, path = synthetic
    assert path.name == "synthetic.png"
    ends = {loss: [run[-1] for run in runs] for loss, runs in curves.items()}
    page = (DOCS / "results" / "easy-positive.md").read_text(encoding="utf-8")
    for name, loss in (("decoupled softmax", "decoupled"), ("softmax", "softmax")):
        seeds = re.search(rf"^\| {name} \| [\d.*]+ \(([^)]*)\)", page, flags=re.M)[1].split(", ")
        assert [round(100 * end["P@1"], 1) for end in ends[loss]] == [float(seeds[0])]
    assert all(
        [point["step"] for point in run] == list(range(100, 1501, 100)) for runs in curves.values() for run in runs
    )
