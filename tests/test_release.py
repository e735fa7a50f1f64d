"""Versions agree, the workflows run what `.ci/run` runs, and a wheel trains in a fresh environment."""

import re
from pathlib import Path

import yaml

import hf_xmc

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
COMMANDS = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_the_version_is_that_of_the_citation_and_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(r"^## (\d\S*), (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert (citation["version"], str(citation["date-released"])) == (hf_xmc.__version__, released[2])
    assert released[1] == hf_xmc.__version__


def test_the_workflow_runs_all_that_ci_runs():
    wanted = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert len(wanted) >= 4
    commands = [f"make {target}" for target in wanted if target != "test"]  # Windows has no make
    assert not [command for command in commands if command not in COMMANDS]
    selected = re.search(r"^test:.*\n\t.*(-m \".*\")$", MAKEFILE, flags=re.M)[1]
    assert any(selected in command and "--dist loadfile" in command for command in COMMANDS)


def test_the_workflow_installs_the_programs_that_tests_need():
    install = "apt-get install --yes"
    installed = {
        name: [step["run"].rpartition(install)[2].split() for step in job["steps"] if install in step.get("run", "")]
        for name, job in WORKFLOW["jobs"].items()
    }
    assert installed["test"] == [["mandoc"]]  # a test of manual pages is skipped without it
    assert installed["test-browser"] == [["chromium-browser"]]
    wanted = re.search(r"--no-install-recommends (.*)$", (ROOT / ".ci" / "run").read_text(), flags=re.M)[1].split()
    assert wanted == ["chromium", "fonts-dejavu-core", "mandoc"]


def test_the_workflow_tests_each_supported_python_on_three_systems():
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert (
        matrix["python-version"][0]
        == re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    )
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
