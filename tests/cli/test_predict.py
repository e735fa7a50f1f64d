"""``hf-xmc predict`` on several processes, and from a data set. The processes are real, and some are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers.processes import launch
from helpers.tiny import LABELS, RECIPES, make_static_encoder

from hf_xmc import XMCModel, distributed
from hf_xmc.cli import main

NUM_TEXTS = 20_500  # not a multiple of 1024, nor of two such blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, texts, and the answers of one process."""
    folder = tmp_path_factory.mktemp("predict")
    XMCModel(make_static_encoder(), LABELS).save_pretrained(folder / "model")
    with (folder / "texts.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"text {number} {LABELS[number % 11]}\u2028\n" for number in range(NUM_TEXTS))
    assert main([*command(folder), "--output", str(folder / "one.jsonl")]) == 0
    assert (folder / "one.jsonl").read_bytes().count(b"\n") == NUM_TEXTS
    return folder


def command(folder):
    return ["predict", str(folder / "model"), "--file", str(folder / "texts.txt"), "--top_k", "2"]


def start(num_processes, folder, output):
    """Start a prediction that resumes, wait until it has written answers, and return its launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    arguments = [str(RECIPES / "predict.py"), *command(folder)[1:], "--output", str(output), "--resume"]
    before = output.stat().st_size if output.exists() else 0
    child = subprocess.Popen([*launcher, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while child.poll() is None and (not output.exists() or output.stat().st_size <= before):
        time.sleep(0.002)
    return child


def workers_of(launcher):
    """Return the ids of the processes that a launcher started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == launcher.pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return sorted(found)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_two_processes_that_are_killed_write_the_answers_of_one(folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    child = start(2, folder, output)
    workers = workers_of(child)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)  # the launcher then ends the other one
    assert child.wait(150) != 0

    child = start(2, folder, output)
    workers = workers_of(child)
    child.kill()  # its processes notice, and end before a new run starts
    assert child.wait(150) == -signal.SIGKILL
    deadline = time.monotonic() + 150
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))
    assert output.read_bytes().count(b"\n") < NUM_TEXTS, "it had ended before it was killed"

    with output.open("ab") as file:
        file.write(b'{"text": "torn')  # as a kill within a write leaves it
    said = launch(3, RECIPES / "predict.py", *command(folder)[1:], "--output", output, "--resume")
    assert re.search(r"hf-xmc predict: [\d,]+ texts on 3 processes, [\d,]+ per second", said)
    with output.open() as file, (folder / "one.jsonl").open() as one:
        for line, expected in zip(file, one, strict=True):
            got, wanted = json.loads(line), json.loads(expected)
            assert got["text"] == wanted["text"]
            assert [label["uid"] for label in got["labels"]] == [label["uid"] for label in wanted["labels"]]


def test_two_processes_write_a_table_like_one(folder, tmp_path):
    """1,500 rows: the second process has a part of the first round only."""
    (tmp_path / "texts.csv").write_text("title,n\n" + "".join(f"a {LABELS[n % 11]},{n}\n" for n in range(1500)))
    arguments = [folder / "model", "--file", tmp_path / "texts.csv", "--text", "title"]
    said = launch(2, RECIPES / "predict.py", *arguments, "--output", tmp_path / "two.csv")
    assert "1,500 texts on 2 processes" in said
    assert main(["predict", *map(str, arguments), "--output", str(tmp_path / "one.csv")]) == 0
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_data_set_answers_like_a_file(folder, capsys, tmp_path):
    rows = Dataset.from_dict({"title": ["a red", "", None], "body": ["boat", "a car", "a cat"], "n": [1, 2, 3]})
    DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(tmp_path / "data")
    rows.save_to_disk(tmp_path / "rows")
    (tmp_path / "files").mkdir()
    rows.to_json(tmp_path / "files" / "test.jsonl")
    expected = XMCModel.from_pretrained(folder / "model").predict(["a red boat", "a car", "a cat"], 2)

    def predict(data, *options):
        arguments = ["predict", folder / "model", "--top_k", 2, "--data", tmp_path / data, *options]
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    for data, options in {"data": ["--split", "test"], "rows": [], "files": ["--split", "test"]}.items():
        code, answers, err = predict(data, *options, "--text", "title,body")
        assert (code, [row["text"] for row in answers]) == (0, ["a red boat", "a car", "a cat"]), err
        assert [[label["uid"] for label in row["labels"]] for row in answers] == [[p.uid for p in e] for e in expected]
    assert "--split must be one of train, test" in predict("data", "--text", "title")[2]
    assert "--split must be left out" in predict("rows", "--split", "test", "--text", "title")[2]
    assert "must have a column 'text' of strings, got title, body, n" in predict("rows")[2]
    assert "must have a column 'n' of strings" in predict("rows", "--text", "n")[2]
    assert "needs a CSV input" in predict("rows", "--text", "title", "--output", tmp_path / "x.csv")[2]
    assert predict("nowhere")[0] == 1
    assert "either with --file or with --data" in predict("rows", "--file", tmp_path / "texts.txt")[2]
    assert main([*command(folder), "--split", "test"]) == 1
    assert "--split needs the data set" in capsys.readouterr().err


def test_places_are_reserved_for_new_labels(folder, capsys, tmp_path):
    texts = [f"{LABELS[number % 11]} text {number}" for number in range(66)]
    rows = Dataset.from_dict({"text": texts, "label_ids": [[number % 11] for number in range(66)]})
    uids = [str(number) for number in range(11)]
    labels = Dataset.from_dict({"uid": uids, "text": LABELS, "seen": [True] * 11})
    model = XMCModel(make_static_encoder(), labels)
    model.calibrate(rows)
    model.add_labels(Dataset.from_dict({"uid": ["new"], "text": [LABELS[3]]}))
    model.save_pretrained(tmp_path / "model")

    def predict(*options):
        code = main(["predict", str(tmp_path / "model"), LABELS[0], "--top_k", "3", *options])
        out, err = capsys.readouterr()
        return code, [label["uid"] for label in json.loads(out)["labels"]] if out else [], err

    assert predict("--new", "1")[1][2:] == ["new"]
    assert predict("--new", "1")[1] == [label.uid for label in model.predict(LABELS[0], 3, new=1)]
    assert "new" not in predict("--new", "0")[1]
    assert predict("--new", "4")[0] == 1
    assert main([*command(folder), "--new", "1"]) == 1
    assert "`new` needs to know how probable new labels are" in capsys.readouterr().err


def test_several_processes_that_are_one_are_refused(folder, capsys, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one process with these variables."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(command(folder)) == 1
    assert "`torchrun --nproc_per_node N`" in capsys.readouterr().err


def test_shares_of_all_processes_are_all_items_in_order(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(distributed.own_shares(range(20), 4)))
    assert [len(share) for share in shares] == [2, 2, 2]
    assert [item for turn in zip(*shares, strict=True) for share in turn for item in share] == list(range(20))
