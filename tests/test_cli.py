"""The command line, in its own process where standard input matters."""

import argparse
import ast
import io
import json
import subprocess
import sys

import layouts
import pytest
from conftest import LABELS, RECIPES

from hf_xmc import XMCModel, load_xmc
from hf_xmc.cli import HelpFormatter, main


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    layouts.write_raw(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def model(encoder, data, tmp_path):
    XMCModel(encoder, load_xmc(data).labels).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.split("\n")[:-1]], err


def test_predict_from_arguments_and_from_a_file(capsys, model, tmp_path):
    expected = XMCModel.from_pretrained(model).predict(["a red boat", "a car\u2028here"], 2)
    (tmp_path / "texts.txt").write_bytes("\ufeffa red boat\r\na car\u2028here\n\n".encode())
    code, rows, _ = run(capsys, "predict", model, "--file", tmp_path / "texts.txt", "--top_k", 2)
    assert code == 0
    assert [row["text"] for row in rows] == ["a red boat", "a car\u2028here", ""]
    assert [row["labels"] for row in rows] == [[p._asdict() for p in labels] for labels in [*expected, []]]
    (alone,) = run(capsys, "predict", model, "a red boat", "--top_k", "2")[1]
    assert [label["text"] for label in alone["labels"]] == [label["text"] for label in rows[0]["labels"]]


def test_labels_to_choose_from_and_whether_they_were_seen(capsys, model, tmp_path):
    changed = XMCModel.from_pretrained(model)
    ids = list(changed.labels["label_id"])
    changed.add_labels(["boat"])
    changed.save_pretrained(model)
    (tmp_path / "ids.txt").write_text("\n".join(ids[:2]) + "\n")
    ((row,), _) = run(capsys, "predict", model, "a red boat", "--allow", tmp_path / "ids.txt")[1:]
    assert sorted(label["label_id"] for label in row["labels"]) == sorted(ids[:2])
    assert [label["seen"] for label in row["labels"]] == [None, None]
    ((row,), _) = run(capsys, "predict", model, "a boat", "--deny", tmp_path / "ids.txt", "--top_k", 9)[1:]
    assert {label["label_id"]: label["seen"] for label in row["labels"]} == {**dict.fromkeys(ids[2:]), "5": False}
    (tmp_path / "ids.txt").write_text("nothing\n")
    assert (
        "label_id 'nothing' is none of the 6 labels"
        in run(capsys, "predict", model, "a", "--deny", tmp_path / "ids.txt")[2]
    )


def test_predict_by_threshold_hierarchy_and_chunks(capsys, model, data, tmp_path):
    saved, rows = XMCModel.from_pretrained(model), load_xmc(data)
    assert "scores are not calibrated yet" in run(capsys, "predict", model, "a", "--threshold", 0.5)[2]
    saved.calibrate(rows.train)
    saved.save_pretrained(model)
    ((every,), _) = run(capsys, "predict", model, "a red boat")[1:]
    least = every["labels"][0]["score"]
    ((kept,), _) = run(capsys, "predict", model, "a red boat", "--threshold", least)[1:]
    assert kept["labels"] == [label for label in every["labels"] if label["score"] >= least]
    assert 0 < len(kept["labels"]) < len(every["labels"])
    _, (metrics,), _ = run(capsys, "evaluate", model, data)
    assert 0 <= metrics["ECE@5"] <= 1
    ids = list(saved.labels["label_id"])
    (tmp_path / "parents.tsv").write_text("".join(f"{child}\t{ids[4]}\n" for child in ids[:4]))
    ((risen,), _) = run(capsys, "predict", model, "a red boat", "--hierarchy", tmp_path / "parents.tsv")[1:]
    assert risen["labels"][0]["label_id"] == ids[4]
    assert risen["labels"][0]["score"] == max(label["score"] for label in every["labels"])
    ((pooled,), _) = run(capsys, "predict", model, "a red boat", "--long_text", "mean")[1:]
    assert pooled == every


def test_predict_from_standard_input_in_a_process_of_its_own(capsys, model, monkeypatch):
    command = [sys.executable, "-m", "hf_xmc.cli", "predict", str(model), "--top_k", "1"]
    done = subprocess.run(command, input=b"a red boat\na blue car\n", capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a red boat", "a blue car"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"fine\n\xff\n")))
    code, _, said = run(capsys, "predict", model, "--top_k", "1")
    assert code == 1
    assert "standard input, line 2: not UTF-8" in said


def test_evaluate_prepare_and_index(capsys, model, data, encoder, tmp_path):
    _, (metrics,), _ = run(capsys, "evaluate", model, data)
    assert {"P@1", "P@5", "PSP@5", "nDCG@5", "R@100"} <= set(metrics)
    assert metrics["num_queries"] == 3
    code, (summary,), _ = run(capsys, "prepare", data, tmp_path / "prepared")
    assert (code, summary["num_labels"], summary["train"], summary["test"]) == (0, 5, 7, 3)
    assert run(capsys, "evaluate", model, tmp_path / "prepared")[1] == [metrics]
    encoder.save_pretrained(str(tmp_path / "encoder"))
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    code, _, _ = run(
        capsys, "index", tmp_path / "encoder", "--labels", tmp_path / "labels.txt", "--output_dir", tmp_path / "mine"
    )
    assert code == 0
    assert list(XMCModel.from_pretrained(tmp_path / "mine").labels["text"]) == LABELS
    run(capsys, "index", tmp_path / "encoder", "--labels", data, "--output_dir", tmp_path / "theirs")
    assert list(XMCModel.from_pretrained(tmp_path / "theirs").labels["text"]) == layouts.LABELS


def test_errors_are_one_line_on_standard_error(capsys, model, data, tmp_path):
    code, rows, err = run(capsys, "predict", tmp_path / "nothing", "a text")
    assert (code, rows) == (1, [])
    assert err.startswith("hf-xmc predict: ")
    assert "is no folder" in err
    (tmp_path / "labels.txt").write_text("boat\n\ncar\n")
    _, _, err = run(capsys, "index", model, "--labels", tmp_path / "labels.txt", "--output_dir", tmp_path / "x")
    assert "labels.txt, line 2: an empty label" in err
    assert not (tmp_path / "x").exists()
    _, _, err = run(capsys, "index", tmp_path / "nothing", "--labels", data, "--output_dir", tmp_path)
    assert "holds no saved XMCModel: choose another folder" in err, "the encoder was read first"
    _, _, err = run(capsys, "predict", model, "a", "--file", tmp_path / "labels.txt")
    assert "as arguments or with --file, not both" in err
    code, _, err = run(capsys, "predict", model, "--file", tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert f"Is a directory: '{tmp_path}'" in err
    other = tmp_path / "other"
    other.mkdir()
    layouts.write_reference(other)
    assert "are not the same: index the labels" in run(capsys, "evaluate", model, other)[2]
    layouts.write_lines(tmp_path / "labels.jsonl", ['{"label_id": "0", "text": "boat"}'])
    layouts.write_lines(tmp_path / "train.jsonl", ['{"text": "a", "label_ids": [0], "label_scores": 1}'])
    code, _, err = run(capsys, "prepare", tmp_path, tmp_path / "prepared")
    assert (code, err.count("\n")) == (1, 1)
    assert "train.jsonl:1: label_scores is 1; expected a list of numbers" in err


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 5, or with --threshold all that reach it, 200 at most)" in shown
    assert "longer than the encoder reads (default: truncate)" in shown
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the split to evaluate on (default: test)" in shown
    assert "(default: default)" in shown
    parser = argparse.ArgumentParser("p", formatter_class=HelpFormatter, description="a\n  b")
    parser.add_argument("--plain", default=3)
    parser.add_argument("--none")
    parser.add_argument("--hidden", default=4, help=argparse.SUPPRESS)
    assert parser.format_help().splitlines()[2:] == [
        "a",
        "  b",
        "",
        "options:",
        "  -h, --help     show this help message and exit",
        "  --plain PLAIN  (default: 3)",
        "  --none NONE",
    ]


def test_every_script_shows_its_defaults():
    made = []
    for path in RECIPES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
                made.append((path.name, [ast.unparse(word.value) for word in node.keywords]))
    assert len(made) > 10
    # predict_peers.py runs where this package is not installed, and writes its one default itself.
    assert [name for name, words in made if "HelpFormatter" not in words] == ["predict_peers.py"]
