"""The card says what is known, the Hub reads its metadata, and what was loaded or written by hand stays."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from helpers.tiny import LABELS, make_static_encoder
from setuptools import Distribution

from hf_xmc import (
    Prediction,
    XMCCard,
    XMCData,
    XMCEvaluator,
    XMCModel,
    XMCTrainer,
    XMCTrainingArguments,
)
from hf_xmc.hub.card import TEMPLATE, current_card, read_card

ROOT = Path(__file__).parents[2]
FACTS = {"num_labels": 18_992, "embedding_dim": 512, "similarity": "dot", "encoder": "a static one"}


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def test_a_full_card():
    decile = {"num_labels": 7, "min_count": 1, "max_count": 3, "precision": 0.0123, "recall": 0.456, "num_positives": 9}
    text = XMCCard(
        **FACTS,
        name="Hypernyms",
        repo_id="org/hypernyms",
        data="WordNet hypernyms",
        dataset_id="org/wordnet",
        num_train=82_115,
        loss="decoupled_softmax",
        loss_settings={"temperature": 1.0},
        hyperparameters={"learning_rate": 0.03},
        num_remembered=1234,
        results={"test": {"P@1": 0.8937, "R@100": 0.9231}},
        variants={"without memory": {"P@1": 0.5, "R@100": 0.25}},
        deciles=[decile],
        training_time="217 seconds",
        hardware="2 CPU cores",
        energy_kwh=0.0061,
        example='a "small" boat',
        predictions=[Prediction("n1", "boat | vessel", 12.345)],
        license="mit",
        language="en",
    ).render()
    for piece in (
        "among 18,992:",
        "largest dot similarity",
        "The nearest of 1,234 queries",
        'from_pretrained("org/hypernyms")',
        r'model.predict("a \"small\" boat"',
        r"| boat \| vessel | 12.3",
        "## Adding labels",
        "On the test split of WordNet hypernyms, in percent:",
        "| this model | 89.37 | 92.31 |",
        "| without memory | 50.00 | 25.00 |",
        "| 1 to 3 | 7 | 1.23 | 45.6 |",
        "| data | WordNet hypernyms, 82,115 training queries |",
        "| loss | `decoupled_softmax` with temperature 1.0 |",
        "| learning_rate | 0.03 |",
        "| time | 217 seconds |",
        "| hardware | 2 CPU cores |",
        "| energy | 0.006 kWh |",
        "## Intended use and limits",
        "arxiv.org/abs/2310.10636",
    ):
        assert piece in text, piece
    about = metadata(text)
    assert (about["library_name"], about["license"], about["language"]) == ("sentence-transformers", "mit", "en")
    assert about["datasets"] == ["org/wordnet"]
    assert {"hf-xmc", "extreme-multilabel-classification", "loss:decoupled_softmax"} <= set(about["tags"])
    (model,) = about["model-index"]
    (result,) = model["results"]
    assert result["task"]["type"] == "extreme-multilabel-classification"
    assert result["dataset"] == {"name": "WordNet hypernyms", "type": "org/wordnet", "split": "test"}
    assert {one["type"]: one["value"] for one in result["metrics"]} == {"P@1": 0.8937, "R@100": 0.9231}


def test_card_leaves_out_unknown_facts():
    text = XMCCard(**FACTS).render()
    assert "not recorded" in text
    assert "not measured" in text
    for absent in ("Results", "None", "| loss |", "label frequency", "| data |"):
        assert absent not in text.split("## Citation")[0], absent
    assert "model-index" not in metadata(text)
    code = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code) == 3
    for block in code:
        compile(block, "card", "exec")


def test_example_of_the_card_adds_labels(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = XMCModel(encoder, LABELS)
    code = re.search(r"## Adding labels.*?```python\n(.*?)```", XMCCard(**FACTS).render(), re.S)[1]
    exec(code, {"model": model})
    assert XMCModel.from_pretrained("with-new-labels").labels["text"][:] == [*LABELS, "a new label"]


def test_built_package_holds_the_template(monkeypatch):
    """With every other file that is no module, as the build finds them."""
    monkeypatch.chdir(ROOT)
    package = Distribution({"script_name": "setup.py"})
    package.parse_config_files(["pyproject.toml"])
    command = package.get_command_obj("build_py")
    command.ensure_finalized()
    built = {Path(source) / name for _, source, _, names in command.get_data_files_without_manifest() for name in names}
    built |= {Path(source) for _, _, source in command.find_all_modules()}
    files = {path.relative_to(ROOT) for path in (ROOT / "hf_xmc").rglob("*") if path.is_file()}
    assert built == {path for path in files if path.suffix != ".pyc"}
    assert TEMPLATE.relative_to(ROOT) in built


def test_card_describes_the_training(queries, tmp_path):
    encoder = make_static_encoder()
    data = XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS}), validation=queries)
    args = XMCTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=1, learning_rate=0.25, save_strategy="no"
    )
    evaluator = XMCEvaluator.from_data(data, "validation", name="validation")
    trainer = XMCTrainer(encoder, args, queries, labels=LABELS, evaluator=evaluator)
    trainer.train()
    found = trainer.evaluate()
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    for piece in (
        "`DecoupledSoftmaxLoss` with temperature 1.0",
        "| learning_rate | 0.25 |",
        "13 training queries",
        "11",
    ):
        assert piece in text, piece
    (result,) = metadata(text)["model-index"][0]["results"]
    values = {one["type"]: one["value"] for one in result["metrics"]}
    assert values["P@5"] == pytest.approx(found["eval_validation_P@5"], abs=1e-6)


def test_handwritten_card_is_kept(encoder, tmp_path):
    model = XMCModel(encoder, LABELS)
    model.card = "# Mine\n"
    model.save_pretrained(tmp_path / "one")
    XMCModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == "# Mine\n"
    XMCModel.from_pretrained(tmp_path / "two", labels=["boat"]).save_pretrained(tmp_path / "three")
    assert "among 1:" in (tmp_path / "three" / "README.md").read_text(), "the card of other labels"


def test_loaded_card_is_rendered_again_when_saved(encoder, queries, tmp_path):
    model = XMCModel(encoder, LABELS)
    model.card = XMCCard(
        **FACTS,
        repo_id="org/boats",
        dataset_id="org/boats-data",
        hyperparameters={"learning_rate": np.float32(0.5), "folder": tmp_path},
        results={"": {"P@1": 0.5}},
        predictions=model.predict("a boat", top_k=2),
    )
    model.save_pretrained(tmp_path / "one")
    first = (tmp_path / "one" / "README.md").read_text()
    assert first == model.card.render().replace("18,992", "11")
    again = XMCModel.from_pretrained(tmp_path / "one")
    again.add_labels(["tug"])
    again.remember(queries)
    again.save_pretrained(tmp_path / "two")
    voting = f" The nearest of {len(queries)} queries with known labels vote too."
    expected = first.replace("among 11:", "among 12:").replace("| labels | 11 |", "| labels | 12 |")
    expected = expected.replace("to a text are predicted.", f"to a text are predicted.{voting}")
    assert (tmp_path / "two" / "README.md").read_text() == expected
    pushed = current_card(again.card, encoder, 12, len(queries), "me/boats2").render()
    assert pushed == expected.replace('"org/boats"', '"me/boats2"')
    assert pushed.count('("me/boats2")') == 2


def test_card_that_was_edited_by_hand_is_kept(encoder, tmp_path):
    XMCModel(encoder, LABELS).save_pretrained(tmp_path / "one")
    readme = tmp_path / "one" / "README.md"
    readme.write_text(text := readme.read_text() + "Mine.\n")
    again = XMCModel.from_pretrained(tmp_path / "one")
    again.add_labels(["tug"])
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == text


@pytest.mark.parametrize("facts", [None, [], {"num_labels": 1}, {**FACTS, "num_labels": "x"}, {**FACTS, "other": 1}])
def test_forged_facts_of_a_card_are_not_used(facts):
    text = XMCCard(**FACTS).render()
    assert read_card(text, {"facts": facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}) == text


def test_published_cards_are_complete():
    cards = sorted((ROOT / "model_cards").glob("*.md"))
    finished = [card for card in cards if card.name != "README.md"]
    assert finished
    for card in finished:
        text = card.read_text()
        (result,) = metadata(text)["model-index"][0]["results"]
        values = {one["type"]: f"{100 * one['value']:.2f}" for one in result["metrics"]}
        assert f"| this model | {' | '.join(values.values())} |" in text
        assert "By label frequency" in text
        assert "not recorded" not in text
