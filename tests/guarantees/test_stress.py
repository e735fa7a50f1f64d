"""Many threads, calls, labels and lines give the same answers, leak no memory and lose no line."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder

from hf_xmc import LabelIndex, XMCModel
from hf_xmc.cli import main

NUM_THREADS = 8
TEXTS = ["a red boat", "old oak tree", "dog and cat", "blue car about", "text", ""]


def resident():
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.promise("Many threads get the predictions of one thread, and no call leaks memory")
@pytest.mark.parametrize("kind", ["static", "bert"])
@pytest.mark.parametrize("calls", [2_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_threads_predict_like_one_and_keep_no_memory(kind, calls, bert_folder, tally):
    if kind == "bert":
        calls //= 20  # a transformer takes twenty times as long
    model = XMCModel(make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder), LABELS)
    expected = [model.predict(text, top_k=3) for text in TEXTS]
    assert len({str(labels) for labels in expected}) > 3
    for _ in range(200):
        model.predict(TEXTS[0], top_k=3)

    def calls_of(thread, number):  # a future for each call would itself be the memory that grows
        return sum(
            model.predict(TEXTS[turn % len(TEXTS)], top_k=3) == expected[turn % len(TEXTS)]
            for turn in range(thread, number, NUM_THREADS)
        )

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(calls_of, range(NUM_THREADS), [calls // 10] * NUM_THREADS))
        before = resident()
        same = sum(pool.map(calls_of, range(NUM_THREADS), [calls] * NUM_THREADS))
    assert same == calls
    assert resident() - before < 64 * 2**20  # 1 KB a call would be 100 MB
    tally(inputs=calls, lost=calls - same)


@pytest.mark.promise("1.3 million labels are searched exactly")
@pytest.mark.parametrize("num_labels", [130_000, pytest.param(1_305_265, marks=pytest.mark.soak)])
def test_labels_of_the_largest_benchmark_are_searched_exactly(num_labels, tally):
    rng = np.random.default_rng(0)
    labels = rng.integers(-3, 4, (num_labels, 24)).astype(np.float16)
    queries = rng.integers(-3, 4, (5, 24)).astype(np.float32)
    found = LabelIndex(labels).search(queries, 100, exclude=np.array([[0, 3], [4, num_labels - 1]]))
    for row, query in enumerate(queries):
        scores = np.concatenate([part.astype(np.float32) @ query for part in np.array_split(labels, 16)])
        scores[{0: [3], 4: [num_labels - 1]}.get(row, [])] = -np.inf
        assert found.label_ids[row].tolist() == np.argsort(-scores, kind="stable")[:100].tolist()
    tally(inputs=len(queries))


@pytest.mark.promise("A prediction on the command line that is killed and resumed writes every line exactly once")
@pytest.mark.parametrize("num_lines", [30_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
def test_predict_killed_and_resumed_writes_every_line_once(num_lines, tally, tmp_path):
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "model")
    with (tmp_path / "texts.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"text {number} {TEXTS[number % 5]}\u2028\n" for number in range(num_lines))
    arguments = [
        "predict",
        tmp_path / "model",
        "--file",
        tmp_path / "texts.txt",
        "--output",
        tmp_path / "answers.jsonl",
    ]
    command = [sys.executable, "-m", "hf_xmc.cli", *map(str, arguments), "--top_k", "1"]
    kills = 0
    for share in (0.0, 0.2, 0.6):
        child = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
        size = int(share * num_lines * 90)
        out = tmp_path / "answers.jsonl"
        while child.poll() is None and (not out.exists() or out.stat().st_size <= size):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills == 3, "it had ended before it was killed"
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"text": "torn')  # as a kill within a write leaves it
    subprocess.run([*command, "--resume"], check=True, timeout=800)
    with (tmp_path / "answers.jsonl").open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            assert row["text"] == f"text {number} {TEXTS[number % 5]}\u2028"
            assert len(row["labels"]) == 1
    assert number + 1 == num_lines
    tally(faults=kills + 1, inputs=num_lines)


def test_existing_output_is_left_alone(capsys, tmp_path):
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "model")
    out = tmp_path / "answers.jsonl"
    predict = ["predict", str(tmp_path / "model"), "a red boat", "cat"]
    assert main([*predict, "--resume"]) == 1
    assert "--resume needs the file to continue. Pass it as --output" in capsys.readouterr().err
    assert main([*predict, "--output", str(out)]) == 0
    before = out.read_bytes()
    assert before.count(b"\n") == 2
    assert main([*predict, "--output", str(out)]) == 1
    assert "already exists. Continue it with --resume" in capsys.readouterr().err
    assert main([*predict, "--output", str(out), "--resume"]) == 0
    assert out.read_bytes() == before
    for another, line in (
        (b'{"text": "another", "labels": []}\n', 1),
        (b"years of work\nand a last line", 2),
        (b"[1]\n", 1),
        (b"{}\n{", 1),
        (b"work", 1),
    ):
        out.write_bytes(another)
        assert main([*predict, "--output", str(out), "--resume"]) == 1
        assert f"line {line} of" in capsys.readouterr().err
        assert out.read_bytes() == another


def test_resume_continues_a_torn_output(capsys, tmp_path):
    """Within a line, at its end, or before the first."""
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "model")
    texts, out = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    texts.write_bytes("\ufeffa red boat\r\n  cat \u2028\U0001f6a2\n\ufeffdog\n".encode())
    predict = ["predict", str(tmp_path / "model"), "--file", str(texts), "--output", str(out), "--resume"]

    def answers():
        rows = [json.loads(line) for line in out.read_bytes().decode().split("\n")[:-1]]
        return [(row["text"], [label["uid"] for label in row["labels"]]) for row in rows]

    assert main(predict) == 0
    whole, expected = out.read_bytes(), answers()
    assert [text for text, _ in expected] == ["a red boat", "  cat \u2028\U0001f6a2", "\ufeffdog"]
    assert b"\r" not in whole
    assert "\U0001f6a2".encode() in whole
    for length in (0, 3, 10, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1):
        out.write_bytes(whole[:length])
        assert main(predict) == 0
        assert answers() == expected
    for others in (b"", b"a red boat\n", "\ufeff\ufeffdog\n".encode()):  # none, and too few, by the last of them too
        texts.write_bytes(others)
        before = out.read_bytes()
        assert main(predict) == 1
        assert "line 3 of" in capsys.readouterr().err
        assert out.read_bytes() == before


def test_closed_pipe_is_no_failure(monkeypatch, tmp_path):
    """As in ``hf-xmc predict ... | head``: nothing is said, and it is no failure."""
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "model")
    reader, writer = os.pipe()
    os.close(reader)
    said = io.StringIO()
    monkeypatch.setattr(said, "close", lambda: None)
    with suppress(BrokenPipeError), os.fdopen(writer, "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", said)
        code = main(["predict", str(tmp_path / "model"), *["a red boat"] * 200])
    assert (code, said.getvalue()) == (0, "")
