"""The scripts behind the tables of docs/results make and measure what they say."""

import argparse
import json
from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp

from hf_xmc import LabelIndex, static_encoder
from hf_xmc.metrics.ranking import precision_at_k


@pytest.fixture
def synthetic(script):
    return script("synthetic")


@pytest.fixture
def compare(script):
    return script("compare")


@pytest.fixture
def small(synthetic):
    return synthetic.Setting(
        num_documents=30,
        num_labels=40,
        num_easy=3,
        num_words=60,
        repeats=4,
        embedding_dim=8,
        num_steps=4,
        batch_size=20,
    )


def test_synthetic_document_has_one_easy_label_and_four_hard_ones(synthetic, small):
    data = synthetic.make_data(small, seed=0)
    labels = [set(text.split()) for text in data.labels["text"]]
    assert len(data.train) == 120
    for split in (data.train, data.test, data.validation):
        for row in split:
            easy, *others = row["label_ids"]
            assert easy < 3
            assert all(3 <= label < 40 for label in others)
            assert len(set(others)) == 4
            assert labels[easy] & set(row["text"].split()[:1])


def test_synthetic_document_keeps_its_words_and_labels_in_every_epoch(synthetic, small):
    data = synthetic.make_data(small, seed=0)
    texts = np.array([text.split() for text in data.train["text"]]).reshape(4, 30, -1)
    assert (texts[:, :, :9] == texts[0, :, :9]).all()  # the shared word and eight of its own
    assert len({tuple(words) for words in texts[:, 0, 9:]}) == 4
    tested = np.array([text.split() for text in data.test["text"]])
    assert (tested[:, :9] == texts[0, :, :9]).all()
    assert data.test["label_ids"][:] == data.train["label_ids"][:30]
    new = {tuple(text.split()[1:9]) for text in data.validation["text"]}
    assert len(new) == 30
    assert new.isdisjoint(tuple(words[1:9]) for words in tested)


def test_measurements_equal_those_of_index_and_metrics(synthetic, small):
    data = synthetic.make_data(small, seed=1)
    encoder = static_encoder([*data.train["text"], *data.labels["text"]], embedding_dim=8, vocab_size=2000)
    found = synthetic.measure(encoder, data.test, data.labels, temperature=0.5)
    index = LabelIndex(encoder.encode_document(list(data.labels["text"]), convert_to_tensor=True))
    queries = encoder.encode_query(list(data.test["text"]), convert_to_tensor=True)
    top = index.search(queries, 5)
    easy = sp.csr_array((np.ones(30), ([*range(30)], [ids[0] for ids in data.test["label_ids"]])), shape=(30, 40))
    assert found["P@1"] == pytest.approx(precision_at_k(top.label_ids, easy, 1))
    assert found["P@5"] == pytest.approx(precision_at_k(top.label_ids, data.relevance("test"), 5))
    share = (queries @ index.embeddings.T / 0.5).softmax(1).gather(1, data.test.with_format("torch")["label_ids"][:])
    assert found["easy"] == pytest.approx(float(share[:, 0].mean()), rel=1e-4)
    assert found["arbitrary"] == pytest.approx(float(share[:, 1:].mean()), rel=1e-4)


def test_pairs_have_one_label_per_query(synthetic):
    data = synthetic.make_data(synthetic.replace(synthetic.PAIRS, num_documents=50, num_labels=50, num_words=80), 0)
    assert sorted(ids[0] for ids in data.train["label_ids"]) == list(range(50))
    assert data.validation is None


@pytest.mark.parametrize("experiment", ["easy", "pairs"])
def test_experiment_writes_metrics_curves_and_plot(experiment, synthetic, tmp_path):
    flags = ["--num_documents", "30", "--num_labels", "40", "--num_words", "60", "--num_steps", "5"]
    more = ["--num_easy", "3", "--repeats", "2", "--seeds", "0", "1"] if experiment == "easy" else []
    where = ["--output_dir", str(tmp_path), "--points", "2", "--batch_size", "10", "--embedding_dim", "8"]
    synthetic.main([experiment, *where, *flags, *more])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert set(metrics) == ({"decoupled", "softmax"} if experiment == "easy" else {"decoupled"})
    for loss, found in metrics.items():
        assert 0 <= found["P@1"] <= 1
        assert found["P@1"] == pytest.approx(np.mean(found["P@1 by seed"]))
        assert [point["step"] for point in curves[loss][0]] == [2, 4, 5]
        assert found["P@1 by seed"] == [run[-1]["P@1"] for run in curves[loss]]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def result(loss, rate, seed, p5, study="losses"):
    metrics = {"P@1": 0.5, "P@5": 0.5, "nDCG@5": p5, "R@100": 1 - p5}
    run = {"study": study, "loss": loss, "learning_rate": rate, "seed": seed}
    return {"run": run, "validation": metrics, "test": metrics, "deciles": [{"recall": 0.5}] * 10}


def test_learning_rate_is_chosen_on_validation_after_all_runs(compare):
    tried = [result("softmax", 0.01, 0, 0.3), result("softmax", 0.03, 0, 0.4)]
    assert compare.best_rate(tried, "losses", "softmax", tried=3) is None
    tried.append(result("softmax", 0.1, 0, 0.2))
    assert compare.best_rate(tried, "losses", "softmax", tried=3) == 0.03
    top_100 = [result("SoftTop-100", rate, 0, p5) for rate, p5 in ((0.01, 0.3), (0.03, 0.4), (0.1, 0.2))]
    assert compare.best_rate(top_100, "losses", "SoftTop-100", tried=3) == 0.1  # by R@100


def test_study_runs_every_seed_at_its_own_learning_rate(compare):
    options = argparse.Namespace(seeds=[0, 1], learning_rates=[0.1, 0.3])
    results = []
    while run := next((r for r in compare.plan(results, options) if r not in [x["run"] for x in results]), None):
        better = run["learning_rate"] == (0.3 if run["study"] == "cosine" else 0.1)
        results.append({"run": run, "validation": dict.fromkeys(("nDCG@5", "R@100"), better)})
    runs = [result["run"] for result in results]
    studies = Counter((run["study"], run["learning_rate"], run["seed"]) for run in runs)
    assert studies == {
        ("losses", 0.1, 0): 6,
        ("losses", 0.3, 0): 6,
        ("losses", 0.1, 1): 6,
        ("cosine", 0.1, 0): 4,
        ("cosine", 0.3, 0): 4,
        ("cosine", 0.3, 1): 4,
        ("negatives", 0.1, 0): 8,
        ("negatives", 0.1, 1): 8,
        ("hard", 0.1, 0): 4,
        ("hard", 0.1, 1): 4,
    }
    assert len({json.dumps(run, sort_keys=True) for run in runs}) == len(runs)


def test_stored_runs_are_not_repeated(compare, synthetic, small, tmp_path, monkeypatch):
    synthetic.make_data(small, seed=0).save(tmp_path / "data")
    settings = ["--learning_rates", "0.1", "--seeds", "0", "--epochs", "1", "--embedding_dim", "8"]
    where = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--batch_size", "60"]
    ran = []
    train = compare.train
    monkeypatch.setattr(compare, "train", lambda run, *rest: ran.append(run) or train(run, *rest))
    monkeypatch.setattr("sys.argv", ["compare.py", *where, *settings, "--seconds", "0.001"])
    compare.main()
    compare.main()
    stored = [json.loads(line)["run"] for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert stored == ran
    assert len({json.dumps(run) for run in ran}) == 2
    assert "decoupled softmax | 0.1 | 1 |" in (tmp_path / "out" / "tables.md").read_text()


OBO = """format-version: 1.2

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:0000119
name: Abnormal kidney
def: "A \\"change\\" of the kidney." [HPO:x]
synonym: "Renal anomaly" EXACT []
synonym: "Abnormal kidney" EXACT layperson []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000120
name: Small kidney
is_a: HP:0000119 {source="x"} ! Abnormal kidney

[Term]
id: HP:0000121
name: old
is_obsolete: true
"""


def test_second_data_set_follows_is_a_relations(script, tmp_path):
    build_hpo = script("build_hpo")
    (tmp_path / "hp.obo").write_text(OBO)
    assert build_hpo.read_terms(tmp_path / "hp.obo") == {
        "HP:0000119": ("Abnormal kidney, Renal anomaly", 'A "change" of the kidney.', []),
        "HP:0000120": ("Small kidney", "", ["HP:0000119"]),
    }


def test_modes_are_compared_at_the_same_seed_and_step(script):
    modes = script("modes")
    measured = {"exact": (40.0, 44.0), "fresh": (39.0, 44.0)}
    rows = [
        {"mode": mode, "seed": seed, "steps": steps, "seconds": 10.0 * seed, "P@1": p, "P@5": 1.0, "R@10": 2.0}
        for mode, values in measured.items()
        for seed, p in enumerate(values)
        for steps in ((12, 24) if mode == "exact" else (12,))
    ]
    assert modes.table(rows[:-1]).splitlines()[2:] == [  # fresh has not been measured with every seed
        "| exact | 12 | 5 | 42.00 ± 2.00 | - | 1.00 ± 0.00 | 2.00 ± 0.00 |",
        "| exact | 24 | 5 | 42.00 ± 2.00 | - | 1.00 ± 0.00 | 2.00 ± 0.00 |",
    ]
    assert modes.table(rows).splitlines()[-1] == (
        "| fresh | 12 | 5 | 41.50 ± 2.50 | -0.50 ± 0.50 | 1.00 ± 0.00 | 2.00 ± 0.00 |"
    )


@pytest.fixture
def saved(monkeypatch):
    """Return the figures that were saved, as the points of the curves in each panel."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, path):
        figures.append(
            {axis.get_title(loc="left"): [line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes}
        )
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_modes_are_drawn_by_steps_and_by_time_in_steps_of_the_first_one(script, saved, tmp_path):
    measured = [("exact", 4, 8.0, 40), ("exact", 8, 16.0, 50), ("bank", 4, 1.0, 38), ("bank", 8, 2.0, 49)]
    rows = [
        {"mode": mode, "seed": seed, "steps": steps, "seconds": seconds + seed, "P@1": p + 2 * seed}
        for seed in (0, 1)
        for mode, steps, seconds, p in measured
    ]
    script("modes").plot(rows[:2], tmp_path / "modes.png")
    script("modes").plot(rows, tmp_path / "modes.png")
    assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")
    assert saved[0]["At equal time"] == [[[4, 40], [8, 50]]]
    a_step = (8 + 16 + 9 + 17) / 24
    assert saved[1] == {
        "P@1 on validation, %: at equal steps": [[[4, 41], [8, 51]], [[4, 39], [8, 50]]],
        "At equal time": [
            [[pytest.approx(8.5 / a_step), 41], [pytest.approx(16.5 / a_step), 51]],
            [[pytest.approx(1.5 / a_step), 39], [pytest.approx(2.5 / a_step), 50]],
        ],
    }


def test_scale_is_drawn_without_sizes_that_failed(script, saved, tmp_path):
    row = {"mode": "exact", "labels": 1000, "seconds": 0.5, "peak_gib": 0.8}
    rows = [row, {"mode": "mined", "labels": 9000, "error": "out of memory"}, row | {"labels": 9000, "seconds": 2.0}]
    script("scale").plot(rows, tmp_path / "scale.png")
    assert saved == [
        {
            "Seconds per step": [[[1000, 0.5], [9000, 2]], []],
            "Peak memory of the process, GiB": [[[1000, 0.8], [9000, 0.8]], []],
        }
    ]


def test_gradient_samples_use_the_bank_of_the_preceding_training(script, saved, tmp_path):
    step = {"warm_steps": 0, "mode": "fresh 0.1", "time": 0.3, "cosine": 0.99}
    script("step").plot([step, step | {"warm_steps": 30, "mode": "bank 0.1", "time": 0.1}], tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert saved == [
        {
            "after 0 steps of training": [[[0.3, 0.99]], []],
            "after 30 steps of training": [[], [[0.1, 0.99]]],
        }
    ]
