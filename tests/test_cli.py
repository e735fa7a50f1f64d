"""The command line; standard input is tested in a process of its own."""

import argparse
import ast
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import dataset_layouts
from helpers.hub_server import Hub, point_client_at
from helpers.tiny import LABELS, RECIPES

from hf_xmc import XMCModel, load_xmc
from hf_xmc.cli import HelpFormatter, main


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_raw(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def model(encoder, data, tmp_path):
    XMCModel(encoder, load_xmc(data).labels).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.split("\n")[:-1]], err


def test_predict_reads_arguments_and_a_file(capsys, model, tmp_path):
    expected = XMCModel.from_pretrained(model).predict(["a red boat", "a car\u2028here"], 2)
    (tmp_path / "texts.txt").write_bytes("\ufeffa red boat\r\na car\u2028here\n\n".encode())
    code, rows, _ = run(capsys, "predict", model, "--file", tmp_path / "texts.txt", "--top_k", 2)
    assert code == 0
    assert [row["text"] for row in rows] == ["a red boat", "a car\u2028here", ""]
    assert [row["labels"] for row in rows] == [[p._asdict() for p in labels] for labels in [*expected, []]]
    (alone,) = run(capsys, "predict", model, "a red boat", "--top_k", "2")[1]
    assert [label["text"] for label in alone["labels"]] == [label["text"] for label in rows[0]["labels"]]


def test_predict_reads_no_file_to_verify_it_if_told_so(capsys, model, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    with (changed / "label_index" / "embeddings.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    assert "is not the file that was saved" in run(capsys, "predict", changed, "a red boat")[2]
    assert run(capsys, "predict", changed, "a red boat", "--no-verify")[0] == 0


def test_predict_explain_writes_what_each_word_adds(capsys, model):
    ((row, blank), _) = run(capsys, "predict", model, "a red boat", "", "--explain", "--top_k", 2)[1:]
    assert [len(row["labels"]), blank["labels"]] == [2, []]
    for label in row["labels"]:
        assert label["words_add_up"]
        assert {tuple(word[key] for key in ("text", "start", "end")) for word in label["words"]} >= {("boat", 6, 10)}
        assert sum(word["weight"] for word in label["words"]) == pytest.approx(label["score"], rel=1e-5)


def test_predict_takes_allow_and_deny_and_writes_whether_labels_were_seen(capsys, model, tmp_path):
    changed = XMCModel.from_pretrained(model)
    ids = list(changed.labels["uid"])
    changed.add_labels(["boat"])
    changed.save_pretrained(model)
    (tmp_path / "ids.txt").write_text("\n".join(ids[:2]) + "\n")
    ((row,), _) = run(capsys, "predict", model, "a red boat", "--allow", tmp_path / "ids.txt")[1:]
    assert sorted(label["uid"] for label in row["labels"]) == sorted(ids[:2])
    assert [label["seen"] for label in row["labels"]] == [None, None]
    ((row,), _) = run(capsys, "predict", model, "a boat", "--deny", tmp_path / "ids.txt", "--top_k", 9)[1:]
    assert {label["uid"]: label["seen"] for label in row["labels"]} == {**dict.fromkeys(ids[2:]), "5": False}
    (tmp_path / "ids.txt").write_text("nothing\n")
    error = run(capsys, "predict", model, "a", "--deny", tmp_path / "ids.txt")[2]
    assert "uid 'nothing' is not one of the 6 labels" in error


def test_predict_takes_threshold_hierarchy_and_long_text(capsys, model, data, tmp_path):
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
    ids = list(saved.labels["uid"])
    (tmp_path / "parents.tsv").write_text("".join(f"{child}\t{ids[4]}\n" for child in ids[:4]))
    ((risen,), _) = run(capsys, "predict", model, "a red boat", "--hierarchy", tmp_path / "parents.tsv")[1:]
    assert risen["labels"][0]["uid"] == ids[4]
    assert risen["labels"][0]["score"] == max(label["score"] for label in every["labels"])
    ((pooled,), _) = run(capsys, "predict", model, "a red boat", "--long_text", "mean")[1:]
    assert pooled == every


def test_predict_reads_standard_input(capsys, model, monkeypatch):
    command = [sys.executable, "-m", "hf_xmc.cli", "predict", str(model), "--top_k", "1"]
    done = subprocess.run(command, input=b"a red boat\na blue car\n", capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a red boat", "a blue car"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"fine\n\xff\n")))
    code, _, said = run(capsys, "predict", model, "--top_k", "1")
    assert code == 1
    assert "standard input, line 2: not UTF-8" in said


def test_evaluate_prepare_and_index_run_in_sequence(capsys, model, data, encoder, tmp_path):
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
    assert list(XMCModel.from_pretrained(tmp_path / "theirs").labels["text"]) == dataset_layouts.LABELS


THESAURUS = """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
<http://a.org/1> a skos:Concept ; skos:prefLabel "boat"@en , "vene"@fi ; skos:altLabel "jolla"@fi .
<http://a.org/2> a skos:Concept ; skos:prefLabel "red boat"@en , "sluuppi"@fi ; skos:broader <http://a.org/1> .
"""


def test_thesaurus_serves_as_vocabulary_labels_and_hierarchy(capsys, encoder, tmp_path):
    (tmp_path / "boats.ttl").write_text(THESAURUS)
    (tmp_path / "corpus.tsv").write_text("purjeet\t<http://a.org/2>\nsoutuvene\t<http://a.org/1>\nairot\t\n")
    options = ("--vocabulary", tmp_path / "boats.ttl", "--language", "fi")
    before = set(tmp_path.iterdir())
    code, (summary,), _ = run(capsys, "prepare", tmp_path / "corpus.tsv", *options)
    assert (code, summary["num_labels"]) == (0, 2)
    assert summary["load_report"]["labels: texts beyond the first of their label"] == 1
    assert set(tmp_path.iterdir()) == before, "nothing is written without a folder to write to"
    encoder.save_pretrained(str(tmp_path / "encoder"))
    thesaurus, model = tmp_path / "boats.ttl", tmp_path / "model"
    index = ("index", tmp_path / "encoder", "--output_dir", model, "--labels", thesaurus, "--language")
    assert "--language must be one of en, fi" in run(capsys, *index, "sv")[2]
    assert run(capsys, *index, "en")[0] == 0
    assert XMCModel.from_pretrained(model).labels["text"][:] == ["boat", "red boat"]
    code, (row,), _ = run(capsys, "predict", model, "a red boat", "--hierarchy", thesaurus)
    assert (code, row["labels"][0]["uid"]) == (0, "http://a.org/1")


def test_prepare_reads_the_given_columns_of_a_table(capsys, tmp_path):
    (tmp_path / "books.csv").write_text("title,blurb,subjects\nSails,on boats,boat; sail\nCars,on wheels,car\n")
    columns = ("--text", "title,blurb", "--labels", "subjects", "--separator", ";")
    code, (summary,), err = run(capsys, "prepare", tmp_path / "books.csv", *columns)
    assert (code, summary["num_labels"]) == (0, 3), err


def test_errors_are_one_line_on_standard_error(capsys, model, data, tmp_path):
    code, rows, err = run(capsys, "predict", tmp_path / "nothing", "a text")
    assert (code, rows) == (1, [])
    assert err.startswith("hf-xmc predict: ")
    assert "is not a folder" in err
    (tmp_path / "labels.txt").write_text("boat\n\ncar\n")
    _, _, err = run(capsys, "index", model, "--labels", tmp_path / "labels.txt", "--output_dir", tmp_path / "x")
    assert "labels.txt, line 2: the label must not be empty" in err
    assert not (tmp_path / "x").exists()
    _, _, err = run(capsys, "index", tmp_path / "nothing", "--labels", data, "--output_dir", tmp_path)
    assert "holds no saved XMCModel. Choose another folder" in err, "the encoder was read first"
    _, _, err = run(capsys, "predict", model, "a", "--file", tmp_path / "labels.txt")
    assert "as arguments or with --file or --data, not both" in err
    code, _, err = run(capsys, "predict", model, "--file", tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert f"Is a directory: '{tmp_path}'" in err
    other = tmp_path / "other"
    other.mkdir()
    dataset_layouts.write_reference(other)
    assert "must have the same labels, got" in run(capsys, "evaluate", model, other)[2]
    dataset_layouts.write_lines(tmp_path / "labels.jsonl", ['{"uid": "0", "text": "boat"}'])
    dataset_layouts.write_lines(tmp_path / "train.jsonl", ['{"text": "a", "label_ids": [0], "label_scores": 1}'])
    code, _, err = run(capsys, "prepare", tmp_path, tmp_path / "prepared")
    assert (code, err.count("\n")) == (1, 1)
    assert "train.jsonl:1: label_scores must be a list of numbers, got 1" in err


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 5; with --threshold, all labels that reach it, at most 200)" in shown
    assert "too long for the encoder (default: truncate)" in shown
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "split to evaluate on (default: test, and all rows of a table)" in shown
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


def test_help_of_every_script_shows_its_defaults():
    made = []
    for path in RECIPES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
                made.append((path.name, [ast.unparse(word.value) for word in node.keywords]))
    assert len(made) > 10
    # predict_peers.py runs where this package is not installed, and writes its one default itself.
    assert [name for name, words in made if "HelpFormatter" not in words] == ["predict_peers.py"]


KINDS = [
    ("ship ore", "a\nship", "boats;iron"),
    ("purr", "tail, paw", "cats"),
    ("ore", "", "iron"),
    ("ship", "a", "boats"),
]
BOOKS = [(f"{title} v{number}", *rest) for number in range(60) for title, *rest in [KINDS[number % 4]]]


@pytest.fixture
def books(tmp_path):
    with (tmp_path / "books.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "abstract", "subjects"])
        writer.writerows([number, *row] for number, row in enumerate(BOOKS))
    return tmp_path / "books.csv"


def test_train_predict_and_evaluate_from_a_csv(capsys, books, tmp_path):
    columns, quick = ["--text", "title,abstract"], ["--preset", "fast", "--embedding_dim", 8, "--use_cpu"]
    named = [*columns, "--labels", "subjects", "--separator", ";"]
    (tmp_path / "more.yaml").write_text("model: static\ndisable_tqdm: true\nnum_train_epochs: 20\n")
    code = main(
        [str(a) for a in ["train", tmp_path / "more.yaml", books, *named, "--output_dir", tmp_path / "run", *quick]]
    )
    out, err = capsys.readouterr()
    out = out[out.index('{\n  "labels"') :]  # after the log of the training
    assert (code, set(json.loads(out))) == (0, {"labels", "memory", "calibration"})
    assert "Chosen for this encoder and these data" in err
    assert "epoch 20 of 20, step " in err
    assert "P@1 100.0" in err
    assert err.count("validation: 11 of 54 training queries are taken.") == 1
    assert err.count("refit: training once more, on all 54 training queries.") == 1
    assert "examples/s" not in err
    assert "Loading weights" not in err
    assert "Writing model shards" not in err
    assert "widget examples" not in err
    assert f'next: hf-xmc predict {tmp_path / "run" / "model"} "a text"' in err
    printed = [value for part in ("labels", "memory") for value in json.loads(out)[part].values()]
    assert printed == [round(value, 4) for value in printed]
    assert {"model", "metrics.json", "history.json", "report.html"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    model = tmp_path / "run" / "model"

    output = ["--output", tmp_path / "predicted.csv", "--top_k", 2, "--device", "cpu", "--batch_size", 7]
    assert run(capsys, "predict", model, "--file", books, *columns, *output)[:2] == (0, [])
    with (tmp_path / "predicted.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["title"], row["abstract"]) for row in rows] == [
        (str(number), *row[:2]) for number, row in enumerate(BOOKS)
    ]
    expected = XMCModel.from_pretrained(model, device="cpu").predict(["ship ore v0 a\nship", "ore v2"], 2)
    for row, labels in zip((rows[0], rows[2]), expected, strict=True):
        assert row["predicted_labels"] == "; ".join(label.text for label in labels)
        assert [float(score) for score in row["predicted_scores"].split("; ")] == pytest.approx(
            [label.score for label in labels], rel=1e-4
        )
    assert set(rows[0]["predicted_labels"].split("; ")) == {"boats", "iron"}
    (tmp_path / "books.csv.gz").write_bytes(gzip.compress(books.read_bytes()))
    again = ["--output", tmp_path / "again.csv", *output[2:]]
    assert run(capsys, "predict", model, "--file", tmp_path / "books.csv.gz", *columns, *again)[:2] == (0, [])
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "predicted.csv").read_bytes()

    _, (metrics,), _ = run(capsys, "evaluate", model, books, *named, "--device", "cpu")
    assert (metrics["P@1"], metrics["num_queries"]) == (1, 60)
    assert run(capsys, "predict", tmp_path / "run", "ship ore")[:2] == run(capsys, "predict", model, "ship ore")[:2]
    (tmp_path / "odd.csv").write_text("title,abstract,subjects\nship,a,boats;planes\n")
    wider = [model, tmp_path / "odd.csv", *named, "--device", "cpu"]
    assert "is not in the vocabulary" in (said := run(capsys, "evaluate", *wider)[2])
    assert "`--unknown drop`" in said
    _, (metrics,), said = run(capsys, "evaluate", *wider, "--unknown", "drop")
    assert (metrics["R@10"], "not in the vocabulary" in said) == (1, True)
    assert run(capsys, "predict", model, "--file", books, *columns, "--output", tmp_path / "rows.jsonl")[0] == 0
    lines = (tmp_path / "rows.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["text"] for line in lines[:2]] == ["ship ore v0 a\nship", "purr v1 tail, paw"]


def test_tables_that_cannot_be_answered_are_refused(capsys, model, books, tmp_path):
    assert (
        "must have one column 'x', got id, title, abstract, subjects"
        in run(capsys, "predict", model, "--file", books, "--text", "title,x")[2]
    )
    assert "Pass its text columns as --text" in run(capsys, "predict", model, "a", "--output", tmp_path / "x.csv")[2]
    table = ["predict", model, "--file", books, "--text", "title"]
    wanted = ["--explain", "--output", tmp_path / "z.csv"]
    assert "--explain needs lines of JSON" in run(capsys, *table, *wanted)[2]
    code, rows, _ = run(capsys, *table, "--explain", "--top_k", 1)
    assert (code, len(rows)) == (0, len(BOOKS))
    assert all("words" in label for row in rows for label in row["labels"])
    _, rows, said = run(capsys, "predict", model, "--file", books)
    assert (rows, "--text must name the text columns" in said) == ([], True)
    assert "got id, title, abstract, subjects" in said
    assert "--separator must not occur in a label, got 'o'" in run(capsys, *table, "--separator", "o")[2]
    assert "--batch_size must be at least 1, got 0" in run(capsys, *table, "--batch_size", 0)[2]
    (tmp_path / "short.csv").write_text("title,other\na,b\nc\n")
    output = ["--output", tmp_path / "y.csv"]
    code, _, said = run(capsys, "predict", model, "--file", tmp_path / "short.csv", "--text", "title", *output)
    assert (code, "short.csv:3: expected 2 cells, got 1. Put cells that contain ',' or a line" in said) == (1, True)
    assert "--output is written without compression" in run(capsys, *table, "--output", tmp_path / "x.csv.gz")[2]
    nowhere = ["--output", tmp_path / "nowhere" / "x.csv"]
    assert "--output must be in a folder that exists and can be written" in run(capsys, *table, *nowhere)[2]
    (tmp_path / "twice.csv").write_text("title,predicted_uids\na,b\n")
    assert (
        "already has the columns predicted_uids"
        in run(capsys, "predict", model, "--file", tmp_path / "twice.csv", "--text", "title")[2]
    )


def test_train_help_shows_the_options_of_most_runs_and_help_all_every_one(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            main(["train", option])
        assert stopped.value.code == 0
        shown[option] = capsys.readouterr().out
    short, long = shown["--help"], shown["--help-all"]
    assert (short.count("\n") <= 100, long.count("\n") > 400) == (True, True)
    for option in ("--text", "--separator", "--encoder", "--preset", "--output_dir", "--learning_rate", "--help-all"):
        assert option in short
    assert "--adam_beta1" in long
    assert "--adam_beta1" not in short
    assert "--validation-size" not in short  # the same option with another dash
    assert "books.csv --text title,abstract" in short


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the data first: a table such as books.csv"),
        (["x.csv", "--epochs", 2], "--epochs is not an option. Did you mean --num_train_epochs?"),
        (["x.csv", "--lerning_rate", 2], "Did you mean --learning_rate"),
        (["x.csv", "--text", "title,", "abstract"], "'abstract' belongs to no option. Quote a value"),
    ],
)
def test_train_says_which_option_is_meant(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, words)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_train_says_mistakes_in_the_words_of_the_command_line(capsys, books, tmp_path):
    columns, out = ["--text", "title", "--labels", "subjects"], ["--output_dir", tmp_path / "out"]
    assert "--output_dir must name a folder" in run(capsys, "train", books, *columns)[2]
    assert "`--separator ';'` for several" in run(capsys, "train", books, *columns, *out)[2]
    assert f"`hf-xmc train {books} --text id --labels subjects`" in run(capsys, "train", books, *out)[2]
    assert f"Did you mean '{books}'?" in run(capsys, "train", tmp_path / "book.csv", *columns, *out)[2]
    assert "Did you mean 'title'?" in run(capsys, "train", books, "--text", "titel", "--labels", "subjects", *out)[2]
    said = run(capsys, "train", books, *columns, "--output_dir", books)[2]
    assert "--output_dir must be a folder that can be written" in said
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_xmc.cli.train.main", stop)
    code, _, said = run(capsys, "train", "books.csv")
    assert (code, "`--resume_from_checkpoint true`" in said) == (130, True)


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 2
    assert "publish a trained model" in capsys.readouterr().out


def test_push_publishes_the_model_of_a_run_with_its_card(capsys, model, tmp_path, monkeypatch):
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    saved = XMCModel.from_pretrained(model)
    saved.card = "---\ntags: [boats]\n---\nWhales and boats."
    saved.save_pretrained(model)
    try:
        code, (answer,), _ = run(capsys, "push", tmp_path, "org/boats")  # whose `model` is published
        assert (code, answer["repo_id"]) == (0, "org/boats")
        assert {"xmc_config.json", "README.md"} <= set(hub.files("org/boats"))
        assert hub.url in answer["commit"]
        pushed = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "cache")
        assert "Whales and boats." in pushed.card
        assert pushed.predict("a red boat") == saved.predict("a red boat")
    finally:
        hub.shutdown()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    code, _, said = run(capsys, "push", tmp_path, "org/boats")
    assert (code, "a push to org/boats needs a token, and none was found" in said) == (1, True)
    code, _, said = run(capsys, "push", tmp_path / "nothing", "org/boats")
    assert code == 1
    assert "`folder` must be the output_dir of a training run or the folder of a model" in said


def test_a_table_from_standard_input_is_answered(capsys, model, monkeypatch):
    table = '\ufefftitle;n\nShip;1\n\n"a\nb";2\n'.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(table)))
    code = main(["predict", str(model), "--text", "title", "--top_k", "1", "--device", "cpu"])
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out), delimiter=";"))
    assert (code, rows[0][:2], [row[:2] for row in rows[1:]]) == (0, ["title", "n"], [["Ship", "1"], ["a\nb", "2"]])
    for damaged, expected in (
        (b"title,n\nShip,1\n\xff,2\n", "standard input: not utf-8 (invalid start byte)"),
        (b'title,n\n"Ship,1\n', "standard input:2: not valid CSV"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(damaged)))
        assert main(["predict", str(model), "--text", "title", "--device", "cpu"]) == 1
        assert expected in capsys.readouterr().err
