"""Training from a CSV to a saved and measured model, from Python."""

import csv
import dataclasses
import json
import resource
import sys

import numpy as np
import pytest
from helpers.tiny import make_static_encoder

import hf_xmc
from hf_xmc import XMCData, XMCModel, load_xmc
from hf_xmc.experiment import measure, run

SUBJECTS = ["boats", "cats", "cooking", "iron"]
QUICK_FOR_ANY = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "preset": "fast"}
QUICK = {**QUICK_FOR_ANY, "embedding_dim": 8}


@pytest.fixture
def books(tmp_path):
    with (tmp_path / "books.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "abstract", "subjects"])
        for number in range(130):
            one, two = SUBJECTS[number % 4], SUBJECTS[(number + 1 + number % 3) % 4]
            writer.writerow([number, f"about {one}", f"and {two},\nvolume {number}", f"{one};{two}"])
    return tmp_path / "books.csv"


COLUMNS = {"text": ["title", "abstract"], "labels": "subjects", "separator": ";"}


def test_train_goes_from_a_csv_to_a_model_with_report_and_card(books, tmp_path):
    model = hf_xmc.train(books, "static", output_dir=tmp_path / "out", **COLUMNS, **QUICK)
    assert sorted(model.labels["text"]) == SUBJECTS
    assert {prediction.text for prediction in model.predict("boats and cats", top_k=2)} == {"boats", "cats"}
    assert model.memory is not None
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = {"split", "num_queries", "num_empty", "labels", "deciles", "memory", "memory_settings", "calibration"}
    expected |= {"num_train", "also_in_train", "train_seconds", "hardware", "recipe", "arguments"}
    assert set(metrics) == expected
    assert (metrics["split"], metrics["num_queries"], metrics["also_in_train"]) == ("test", 13, {})
    assert metrics["recipe"]["text"] == "title,abstract"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "books.csv" in page
    saved = XMCModel.from_pretrained(tmp_path / "out" / "model", device="cpu")
    assert saved.predict("boats and cats") == model.predict("boats and cats")
    readme = (tmp_path / "out" / "model" / "README.md").read_text()
    assert saved.card.render() == model.card.render() == readme
    assert "books.csv" in readme


@pytest.mark.parametrize("encoder", ["static", "phrases"])
def test_train_scales_embeddings_to_unit_norm_if_asked(books, tmp_path, encoder):
    model = hf_xmc.train(books, encoder, output_dir=tmp_path / "out", normalize=True, **COLUMNS, **QUICK)
    saved = XMCModel.from_pretrained(tmp_path / "out" / "model", device="cpu")
    for one in (model, saved):
        norms = [*one.embed(["boats and cats"]).norm(dim=1), *one.index.embeddings.norm(dim=1)]
        assert [float(norm) for norm in norms] == pytest.approx([1] * 5, abs=1e-5)
    recipe = json.loads((tmp_path / "out" / "metrics.json").read_text())["recipe"]
    assert (recipe["normalize"], recipe["temperature"]) == (True, 0.05)


@pytest.mark.parametrize(("name", "value"), [("pooling", "cls"), ("max_seq_length", 16)])
def test_train_refuses_settings_that_an_encoder_of_words_would_ignore(books, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` needs a pretrained transformer, got model 'static'"):
        hf_xmc.train(books, "static", output_dir=tmp_path, **{name: value}, **COLUMNS, **QUICK)


@pytest.mark.parametrize("name", ["normalize", "pooling", "max_seq_length", "start_from"])
def test_train_refuses_settings_of_the_encoder_next_to_an_encoder(books, tmp_path, name):
    with pytest.raises(TypeError, match=f"^{name} must not be given with an encoder object"):
        hf_xmc.train(books, make_static_encoder(), output_dir=tmp_path, **{name: True}, **COLUMNS, **QUICK_FOR_ANY)


def test_train_takes_an_encoder_and_data_in_memory(books, tmp_path):
    data, encoder = load_xmc(books, **COLUMNS), make_static_encoder()
    model = hf_xmc.train(data, encoder, output_dir=tmp_path / "out", **QUICK_FOR_ANY, memory=False)
    assert model.encoder is encoder
    recipe = json.loads((tmp_path / "out" / "metrics.json").read_text())["recipe"]
    assert (recipe["model"], recipe["rarity"]) == ("SentenceTransformer", 0.0)


def test_the_report_is_left_out_with_a_warning_without_matplotlib(books, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "hf_xmc.experiment.report", raising=False)
    hf_xmc.train(books, "static", output_dir=tmp_path / "out", **COLUMNS, **QUICK)
    assert "pip install 'hf_xmc[report]'" in caplog.text
    assert not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "model" / "README.md").exists()


def test_the_model_is_saved_before_it_is_measured(books, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_xmc.train(books, "static", output_dir=tmp_path / "out", **COLUMNS, **QUICK)
    assert XMCModel.from_pretrained(tmp_path / "out" / "model", device="cpu").predict("boats", top_k=1)


def test_wrong_arguments_are_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_xmc", None)
    with pytest.raises(TypeError, match="model must not be given"):
        hf_xmc.train("missing.csv", output_dir=tmp_path / "out", model="static")
    with pytest.raises(ValueError, match="`loss` must be one of"):
        hf_xmc.train("missing.csv", output_dir=tmp_path / "out", loss="x")
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no saved XMCModel"):
        hf_xmc.train("missing.csv", output_dir=tmp_path / "out")


def test_a_folder_without_space_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_xmc", None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # a file may not grow further, as on a full disk
    try:
        with pytest.raises(ValueError, match=r"`output_dir` must be a folder that can be written, got .*No space left"):
            hf_xmc.train("missing.csv", output_dir=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_few_validation_queries_give_intervals_and_a_warning(books, tmp_path, caplog):
    hf_xmc.train(books, "static", output_dir=tmp_path / "out", **COLUMNS, **QUICK)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = metrics["calibration"]
    assert found["validation_queries"] == 23
    assert found["thresholds"]
    assert found["probabilities"]
    for low, high in [row["interval"] for row in (*found["thresholds"], *found["probabilities"])]:
        assert 0 <= low < high <= 1
    assert caplog.text.count("based on 23 validation queries with labels, fewer than 100. ECE@5 lies between") == 1
    assert "are in the memory" not in caplog.text
    assert "not_calibrated" not in metrics
    said = "Only 23 texts determine the probabilities: the error is"
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert said in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_model_with_very_few_validation_queries_is_not_calibrated_and_says_so(books, tmp_path, caplog):
    rows = books.read_text().split('volume 60"', maxsplit=1)[0]
    books.write_text(rows + 'volume 60",boats;cats\n')
    model = hf_xmc.train(books, "static", output_dir=tmp_path / "out", refit=False, **COLUMNS, **QUICK)
    assert model.calibration is None
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    reason = "calibration needs at least 10 validation queries with labels, got 6."
    assert reason in metrics["not_calibrated"]
    assert "calibration" not in metrics
    assert reason in caplog.text
    assert f"The scores are not probabilities, and no thresholds are chosen: {reason}" in (
        (tmp_path / "out" / "report.html").read_text()
    )
    assert f"The scores are not calibrated: {reason}" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_run_says_that_it_replaces_another(books, tmp_path, caplog):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    hf_xmc.train(books, "static", output_dir=tmp_path / "out", **COLUMNS, **QUICK)
    assert "holds a run, which is started again and replaced" in caplog.text


def test_data_in_memory_are_refused_with_the_line_to_write(tmp_path):
    for read in (load_xmc, lambda data: hf_xmc.train(data, output_dir=tmp_path / "out")):
        with pytest.raises(ValueError, match=r"got dict.*`XMCData.from_pandas\(frame"):
            read({"text": ["a"]})


def test_a_separator_that_occurs_nowhere_is_named(books, caplog):
    data = load_xmc(books, text="title", labels="subjects", separator="|")
    assert "boats;cats" in data.labels["text"]
    assert "no cell of column 'subjects' holds the separator '|'" in caplog.text
    assert "Is the separator ';'?" in caplog.text


def test_texts_in_two_given_splits_are_counted_and_said(tmp_path, caplog):
    texts = [f"about {SUBJECTS[number % 4]} {number}" for number in range(30)]
    labels = [[SUBJECTS[number % 4]] for number in range(30)]
    both = [*texts[:3], "about iron, new"], [*labels[:3], ["iron"]]
    data = hf_xmc.XMCData.from_lists(texts, labels, validation=(texts[29:], labels[29:]), test=both)
    hf_xmc.train(data, "static", output_dir=tmp_path / "out", **QUICK)
    assert "3 of 4 test texts are training texts too" in caplog.text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["also_in_train"] == {"validation": 1, "test": 3}
    assert "3 test texts are training texts too." in (tmp_path / "out" / "report.html").read_text()


def test_splits_that_are_taken_from_train_share_no_text(tmp_path, caplog):
    path = tmp_path / "books.csv"
    path.write_text(
        "text,labels\n" + "".join(f"about {SUBJECTS[row % 4]} {row % 25},{SUBJECTS[row % 4]}\n" for row in range(200))
    )
    hf_xmc.train(path, "static", text="text", labels="labels", output_dir=tmp_path / "out", **QUICK)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["also_in_train"] == {}
    assert "training texts too" not in caplog.text


def data_with(number, **splits):
    texts = [f"about {SUBJECTS[n % 4]} {n}" for n in range(number)]
    made = XMCData.from_lists(texts, [[SUBJECTS[n % 4]] for n in range(number)], vocabulary=SUBJECTS)
    return dataclasses.replace(made, **{name: made.train.select(range(size)) for name, size in splits.items()})


def test_a_refit_trains_on_all_queries_and_keeps_what_validation_tuned(tmp_path, monkeypatch):
    trained, tuned = [], []
    fit, tune, calibrate = run.fit, XMCModel.tune_memory, XMCModel.calibrate
    monkeypatch.setattr(run, "fit", lambda *args, **more: trained.append(fit(*args, **more)) or trained[-1])
    monkeypatch.setattr(
        XMCModel, "tune_memory", lambda self, *args, **more: tuned.append(self) or tune(self, *args, **more)
    )
    monkeypatch.setattr(
        XMCModel, "calibrate", lambda self, *args, **more: tuned.append(self) or calibrate(self, *args, **more)
    )
    model = hf_xmc.train(data_with(200, test=9), "static", output_dir=tmp_path, **QUICK)
    assert [len(one.trainer.train_dataset) for one in trained] == [160, 200]  # a fifth is held out
    (first,) = set(tuned)  # the model that does not know the validation queries
    assert first is not model
    assert model.memory.settings == first.memory.settings
    assert model.calibration == first.calibration is not None
    assert len(model.memory) == len(first.memory) == 200
    assert not np.allclose(model.embed(["about cats"]), first.embed(["about cats"]))
    saved = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert saved.predict("about cats") == model.predict("about cats") != first.predict("about cats")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["recipe"]["refit"], metrics["num_train"], metrics["split"]) == (True, 200, "test")
    assert metrics["memory"]["P@1"] == pytest.approx(
        measure.evaluate(model, data_with(200, test=9), "test", "default")["labels"]["P@1"]
    )
    assert metrics["calibration"]["validation_queries"] == 40


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (data_with(50), {}),  # nothing would measure the model
        (data_with(50, test=9), {"refit": False}),
        (data_with(50, test=9), {"validation_size": 0}),
        (data_with(50, test=9, validation=20), {}),
    ],
    ids=["no test", "off", "no validation", "validation of its own"],
)
def test_there_is_no_refit_without_a_reason(tmp_path, data, settings):
    hf_xmc.train(data, "static", output_dir=tmp_path, **QUICK, **settings)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["recipe"]["refit"] is False
    assert metrics["num_train"] == (45 if data.validation is None and "validation_size" not in settings else 50)


@pytest.mark.parametrize(
    ("data", "settings", "missing"),
    [
        (data_with(50), {}, "a test split with labels"),
        (data_with(50, test=9), {"validation_size": 0}, "validation queries that are taken from train"),
        (data_with(50, test=9, validation=20), {}, "validation queries that are taken from train"),
    ],
)
def test_an_impossible_refit_is_refused_before_training(tmp_path, monkeypatch, data, settings, missing):
    monkeypatch.setattr(run, "fit", None)
    with pytest.raises(ValueError, match=f"^`refit` needs {missing}"):
        hf_xmc.train(data, "static", output_dir=tmp_path, refit=True, **QUICK, **settings)


def test_an_encoder_object_cannot_be_trained_twice(tmp_path):
    with pytest.raises(TypeError, match=r"^refit must not be given with an encoder object"):
        hf_xmc.train(data_with(50), make_static_encoder(), output_dir=tmp_path, refit=True, **QUICK_FOR_ANY)


@pytest.mark.parametrize("encoder", ["static", "phrases"])
def test_a_model_of_few_texts_has_classifiers(tmp_path, encoder):
    data = data_with(60, test=9)
    model, plain = (
        hf_xmc.train(data, encoder, output_dir=tmp_path / str(on), classifiers=on, memory=False, refit=False, **QUICK)
        for on in (None, False)
    )
    size = plain.encoder.get_embedding_dimension()
    assert model.encoder.get_embedding_dimension() == size + len(SUBJECTS)
    np.testing.assert_allclose(model.embed(["about cats 1"])[:, :size], plain.embed(["about cats 1"]), rtol=1e-6)
    scores, before = ({label.text: label.score for label in one.predict("about cats 1", 4)} for one in (model, plain))
    gained = {name: scores[name] - before[name] for name in SUBJECTS}
    assert gained["cats"] == max(gained.values()) > 5
    recipe = json.loads((tmp_path / "None" / "metrics.json").read_text())["recipe"]
    assert recipe["classifiers"] is True
    saved = XMCModel.from_pretrained(tmp_path / "None" / "model", device="cpu")
    assert saved.predict("about cats") == model.predict("about cats")


def test_take_settings_refuses_a_model_with_other_labels():
    one, other = (XMCModel(make_static_encoder(), names) for names in (["boats", "cats"], ["boats", "iron"]))
    with pytest.raises(ValueError, match=r"^`tuned` must have the same labels"):
        one.take_settings(other)


def test_labels_that_only_the_validation_texts_taken_from_train_have_are_not_new(tmp_path):
    texts = [f"about {SUBJECTS[n % 4]} {n}" for n in range(200)]
    names = [*SUBJECTS, *(f"volume {n}" for n in range(200))]
    labels = [[SUBJECTS[n % 4], f"volume {n}"] for n in range(200)]
    test = (texts[:9], labels[:9])
    data = XMCData.from_lists(texts, labels, vocabulary=names, test=test)
    model = hf_xmc.train(data, "static", output_dir=tmp_path / "out", memory=False, refit=False, **QUICK)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_train"] == 180
    assert model.calibration is not None
    assert all(model.labels["seen"])
    found = model.search(texts[:9], 10, probabilities=True)
    np.testing.assert_array_equal(found.label_ids, model.search(texts[:9], 10).label_ids)  # no place is reserved


def test_labels_without_a_training_text_are_new(tmp_path):
    texts, labels = [f"about {SUBJECTS[n % 4]} {n}" for n in range(60)], [[SUBJECTS[n % 4]] for n in range(60)]
    given = (["about rivers"] * 10, [["rivers"]] * 10)
    vocabulary = [*SUBJECTS, "rivers", "seas"]
    data = XMCData.from_lists(texts, labels, vocabulary=vocabulary, validation=given)
    model = hf_xmc.train(data, "static", output_dir=tmp_path, memory=False, **QUICK)
    assert model.labels["seen"] == [True] * 4 + [False] * 2
