"""Recipes save a model for data without test or validation queries, and for few rows."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import dataset_layouts

from hf_xmc import XMCModel, XMCTrainer, load_xmc
from hf_xmc.experiment import measure
from hf_xmc.experiment.card import write_card
from hf_xmc.experiment.report import write_report

TEXTS = ["boats", "cats", "dogs", "iron"]
QUICK = ["--model", "static", "--embedding_dim", "8", "--num_train_epochs", "1", "--use_cpu", "true"]
QUICK += ["--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture
def recipe(script):
    """Return the training script and the path of its settings."""
    train = script("train")
    return train, str(train.__file__).replace("train.py", "static.yaml")


def write(folder, num_rows=10, **splits):
    folder.mkdir()
    rows = [{"text": f"about {TEXTS[n % 4]} {n}", "label_ids": [n % 4]} for n in range(num_rows)]
    for name, table in {"labels": [{"text": t} for t in TEXTS], "train": rows, **splits}.items():
        dataset_layouts.write_lines(folder / f"{name}.jsonl", [json.dumps(row) for row in table])
    return folder


def run(recipe, data, output_dir, *flags):
    train, settings = recipe
    train.main([str(settings), "--data", str(data), "--output_dir", str(output_dir), *QUICK, *flags])
    model = XMCModel.from_pretrained(output_dir / "model", device="cpu")
    assert len(model.predict("about boats", top_k=4)) == 4
    return model, json.loads((output_dir / "metrics.json").read_text())


ONE = [{"text": "about iron", "label_ids": [3]}]
NO_LABELS = [{"text": "about nothing", "label_ids": []}]
CASES = {  # more splits, flags, the split that is measured, and whether memory and calibration were fitted
    "ten rows": ({}, [], "validation", False),
    "ten validation queries": ({"validation": ONE * 10}, [], "validation", True),
    "no validation": ({}, ["--validation_size", "0"], None, False),
    "no validation, with the memory off": ({}, ["--validation_size", "0", "--memory", "false"], None, False),
    "no validation, the best checkpoint": (
        {},
        ["--validation_size", "0", "--save_strategy", "best", "--metric_for_best_model", "nDCG@5"],
        None,
        False,
    ),
    "a test split alone": ({"test": ONE}, ["--validation_size", "0"], "test", False),
    "a validation query": ({"validation": ONE}, [], "validation", False),
    "a validation query without labels": ({"validation": NO_LABELS, "test": ONE}, [], "test", False),
    "a test query without labels": ({"test": NO_LABELS}, ["--validation_size", "0.3"], "validation", False),
}


@pytest.mark.parametrize("case", CASES)
def test_model_is_saved_with_any_splits(case, recipe, tmp_path, caplog):
    splits, flags, split, fitted = CASES[case]
    model, report = run(recipe, write(tmp_path / "data", **splits), tmp_path / "out", *flags)
    assert report["split"] == split
    assert ("labels" in report) == (split is not None)
    assert (model.calibration is not None) == fitted
    assert (len(model.memory) if model.memory else 0) == (0 if "--memory" in flags else 10)
    said = caplog.text
    assert ("The scores are not calibrated" in said) == ("not_calibrated" in report) == (not fitted)
    assert ("nothing is measured" in said) == (split is None)
    if case in ("ten rows", "no validation"):
        data = load_xmc(tmp_path / "data")
        text = write_card(tmp_path / "out", data, "data").render()
        assert ("On the validation split" in text) == (split is not None)
        page = write_report(tmp_path / "out", data, "data").read_text()
        assert ("Nothing was measured" in page) == (split is None)
        assert ("<h2>1 validation text</h2>" if split else "<h2>10 training texts</h2>") in page
        assert '<li class="right">' in page


@pytest.mark.parametrize("num_rows", [1, 3])
def test_recipe_trains_on_few_rows(num_rows, recipe, tmp_path):
    model, _ = run(recipe, write(tmp_path / "data", num_rows), tmp_path / "out", "--rarity", "0")
    assert len(model.memory) == num_rows


@pytest.mark.parametrize("stage", ["evaluate", "calibrate"])
def test_model_is_saved_if_a_later_step_fails(stage, recipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(measure, stage, fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        run(recipe, write(tmp_path / "data"), tmp_path / "out")
    assert XMCModel.from_pretrained(tmp_path / "out" / "model", device="cpu").predict("about boats", top_k=1)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_train"] == 9
    assert json.loads((tmp_path / "out" / "history.json").read_text())


WRONG = {
    "propensity": "`propensity` must be one of default, amazon, wikipedia, got 'x'",
    "memory_metric": "`memory_metric` must be one of P@1, .* got 'x'",
    "loss": "`loss` must be one of decoupled_softmax, .* got 'x'",
    "metric_for_best_model": "`metric_for_best_model` must be one of P@1, .* got 'x'",
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_setting_is_refused_before_the_first_step(name, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(XMCTrainer, "train", None)
    with pytest.raises(ValueError, match=WRONG[name]):
        run(recipe, write(tmp_path / "data"), tmp_path / "out", f"--{name}", "x")


@pytest.mark.parametrize(
    ("name", "value"), [("validation_size", "1"), ("validation_size", "-0.1"), ("memory_tolerance", "nan")]
)
def test_number_out_of_range_is_refused_before_the_data_are_read(name, value, recipe, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0.*, got {value}"):
        run(recipe, tmp_path / "missing", tmp_path / "out", f"--{name}", value)


def test_folder_without_a_model_is_refused_before_the_data_are_read(recipe, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out/model exists and holds no saved XMCModel"):
        run(recipe, tmp_path / "missing", tmp_path / "out")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "model").write_text("x")
    with pytest.raises(ValueError, match=r"file/model is a file\. Choose another folder"):
        run(recipe, tmp_path / "missing", tmp_path / "file")


def test_interrupted_run_resumes_with_every_form_of_the_flag(recipe, tmp_path, monkeypatch):
    train, settings = recipe
    data, steps = write(tmp_path / "data", 16), []
    save = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--per_device_train_batch_size", "4"]
    save += ["--validation_size", "0", "--logging_steps", "1"]
    step = XMCTrainer.training_step

    def counted(trainer, *arguments):
        steps.append(trainer.state.global_step)
        if (trainer.state.global_step, trainer.args.run_name) == (3, "interrupted"):
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    monkeypatch.setattr(XMCTrainer, "training_step", counted)
    run(recipe, data, tmp_path / "whole", *save)
    expected = losses_of(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, tmp_path / "half", *save, "--run_name", "interrupted")
    assert [path.name for path in (tmp_path / "half").glob("*") if path.name.startswith("check")] == ["checkpoint-2"]
    assert not (tmp_path / "half" / "model").exists()

    (tmp_path / "true.yaml").write_text(Path(settings).read_text() + "resume_from_checkpoint: true\n")
    ways = {"true": ["true"], "capital": ["True"], "yaml": [], "path": ["checkpoint-2"], "false": ["false"]}
    for name, values in ways.items():
        folder = shutil.copytree(tmp_path / "half", tmp_path / name)
        flags = [f"--resume_from_checkpoint={folder / value if name == 'path' else value}" for value in values]
        steps.clear()
        run((train, tmp_path / "true.yaml" if name == "yaml" else settings), data, folder, *save, *flags)
        assert steps == ([0, 1, 2, 3] if name == "false" else [2, 3]), name
        assert losses_of(folder) == pytest.approx(expected), name

    for value, message in (
        ("true", "holds no complete checkpoint to resume from"),
        ("elsewhere", "not a complete checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe, data, tmp_path / "new", *save, "--resume_from_checkpoint", value)


def losses_of(folder):
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
