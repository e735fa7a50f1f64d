"""What the README shows is what runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_written(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    answers = [line for line in done.stdout.splitlines() if re.match(r" *-?\d+\.\d\d  [nv]\d{8}  \S", line)]
    assert len(answers) == 3, done.stdout
    assert (tmp_path / "runs" / "readme" / "model" / "xmc_config.json").exists()


def test_the_two_commands_are_the_ones_ci_runs():
    assert re.search(r"```bash\nmake demo .*\nmake test", README)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_into_the_repository_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("tests/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
