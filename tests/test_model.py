"""What is saved is what is loaded, alone or with sentence-transformers only; what was changed is refused."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, make_bert_encoder, make_static_encoder
from datasets import Dataset
from forge import forge
from sentence_transformers import SentenceTransformer

from hf_xmc import Prediction, XMCModel, pipeline

TEXTS = ["a red boat", "old oak tree", "dog and cat"]


@pytest.fixture
def model(encoder):
    return XMCModel(encoder, Dataset.from_dict({"label_id": [f"L{i}" for i in range(11)], "text": LABELS}))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_predictions_are_the_labels_of_the_largest_dot_products(model, encoder):
    scores = encoder.encode(TEXTS[0]) @ encoder.encode(LABELS).T
    best = np.argsort(-scores)[:3]
    predictions = model.predict(TEXTS[0], top_k=3)
    assert [(p.label_id, p.text) for p in predictions] == [(f"L{i}", LABELS[i]) for i in best]
    assert [p.score for p in predictions] == pytest.approx(scores[best].tolist())
    assert isinstance(predictions[0], Prediction)


def test_one_text_gives_a_list_and_several_give_lists(model):
    alone = model.predict(TEXTS[0], top_k=2)
    for found in (model.predict(TEXTS, top_k=2)[0], model.predict(["", TEXTS[0], " \n"], top_k=2)[1]):
        assert [p.text for p in found] == [p.text for p in alone]
        # One row and several are multiplied in another order.
        assert [p.score for p in found] == pytest.approx([p.score for p in alone], rel=1e-5)
    assert model.predict([]) == []
    assert model.predict(["", " \n"], top_k=2) == [[], []]
    assert len(model.predict(TEXTS[0], top_k=100)) == 11


def test_texts_without_end_are_answered_block_by_block(model):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield TEXTS[number % 3]

    answers = model.predict_stream(endless(), 2)
    first = [next(answers) for _ in range(1030)]
    assert len(read) == 2 * 1024
    for place, expected in enumerate(model.predict(TEXTS, 2)):
        for found in (first[place], first[1026 + place]):
            assert [p.label_id for p in found] == [p.label_id for p in expected]


def test_the_progress_bar_counts_texts(model, capsys):
    model.predict(TEXTS, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err
    model.predict(TEXTS)
    assert capsys.readouterr().err == ""


def test_search_takes_labels_to_choose_from(model):
    everything = model.search(TEXTS[:1], 11).label_ids[0].tolist()
    assert model.search(TEXTS[:1], 11, deny=everything[:1]).label_ids[0].tolist() == [*everything[1:], -1]
    assert sorted(model.search(TEXTS[:1], 2, allow=[4, 7]).label_ids[0].tolist()) == [4, 7]


@pytest.mark.parametrize("kind", ["static", "bert"])
def test_a_saved_model_predicts_the_same(kind, bert_folder, tmp_path):
    encoder = make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder)
    model = XMCModel(encoder, LABELS)
    model.save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.predict(TEXTS) == model.predict(TEXTS)
    assert torch.equal(again.index.embeddings, model.index.embeddings)


def test_whether_a_label_was_seen_is_kept_where_it_is_known(encoder, model, tmp_path):
    seen = [True, False] * 5 + [True]
    table = model.labels.add_column("seen", seen).add_column("color", ["red"] * 11)
    XMCModel(encoder, table).save_pretrained(tmp_path / "model")
    again = XMCModel.from_pretrained(tmp_path / "model")
    assert again.labels["seen"][:] == seen
    assert again.labels.column_names == ["label_id", "text", "seen"]
    assert again.predict(TEXTS) == model.predict(TEXTS)
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").labels.column_names == ["label_id", "text"]


def test_the_encoder_loads_where_this_package_cannot_be_imported(saved, encoder):
    code = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "hf_xmc":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
try:
    import hf_xmc
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_xmc can be imported: the test tests nothing")
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print(model.similarity_fn_name, *model.encode("a red boat").tolist())
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code, saved], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    similarity, *embedding = run.stdout.split()
    assert similarity == "dot"
    assert list(map(float, embedding)) == pytest.approx(encoder.encode("a red boat").tolist())


def test_saving_again_replaces_the_model_and_leaves_nothing_else(model, saved):
    model.save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert XMCModel.from_pretrained(saved).predict(TEXTS) == model.predict(TEXTS)


def test_a_save_that_fails_loses_nothing(model, saved, monkeypatch):
    before = model.predict(TEXTS)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_xmc.hub.release.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert XMCModel.from_pretrained(saved).predict(TEXTS) == before


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no saved XMCModel: choose another folder"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "modules.json", "label_index/labels.parquet", "label_index/embeddings.safetensors"]
)
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_file_that_is_not_the_one_saved_is_refused(saved, name, damage):
    path = next(saved.rglob(name.rsplit("/", maxsplit=1)[-1]))
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    expected = "missing" if damage == "missing" else "not the file that was saved"
    with pytest.raises(ValueError, match=f"{path.name} is {expected}"):
        XMCModel.from_pretrained(saved)


def test_the_card_may_be_edited(saved, model):
    (saved / "README.md").write_text("# Mine")
    assert XMCModel.from_pretrained(saved).predict(TEXTS) == model.predict(TEXTS)


def test_folders_that_are_no_model(saved, encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        XMCModel.from_pretrained(tmp_path / "nothing")
    forge(saved, format_version=99)
    with pytest.raises(ValueError, match="is of format 99; this version reads 1"):
        XMCModel.from_pretrained(saved)
    (saved / "xmc_config.json").unlink()
    with pytest.raises(ValueError, match=r"a label_index and no xmc_config.json: it was not saved, or not uploaded"):
        XMCModel.from_pretrained(saved)
    assert SentenceTransformer(str(saved)).get_embedding_dimension() == 16
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no xmc_config.json, and does not load as a model of sentence-transf"):
        XMCModel.from_pretrained(tmp_path / "empty")


def test_a_plain_encoder_loads_and_says_what_to_build(encoder, tmp_path, caplog):
    encoder.save_pretrained(str(tmp_path / "plain"))
    model = XMCModel.from_pretrained(tmp_path / "plain")
    assert (
        "an encoder without labels, and predicts nothing yet: XMCModel.from_pretrained(name, labels=[...])"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"the model has no label to predict: .* `hf-xmc index name --labels FILE"):
        model.predict(TEXTS)
    labelled = XMCModel.from_pretrained(tmp_path / "plain", labels=LABELS)
    assert labelled.predict(TEXTS) == XMCModel(encoder, LABELS).predict(TEXTS)
    model.save_pretrained(tmp_path / "unlabelled")
    again = XMCModel.from_pretrained(tmp_path / "unlabelled")
    assert (len(again.labels), again.encoder.encode("boat").tolist()) == (0, encoder.encode("boat").tolist())
    assert not (tmp_path / "unlabelled" / "label_index").exists()


def test_other_labels_take_the_place_of_the_saved_ones(saved, encoder):
    (saved / "label_index" / "embeddings.safetensors").unlink()  # they are not read
    model = XMCModel.from_pretrained(saved, labels=["boat", "oak"])
    assert model.predict(TEXTS) == XMCModel(encoder, ["boat", "oak"]).predict(TEXTS)
    assert len(model.labels) == 2
    (saved / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was saved"):
        XMCModel.from_pretrained(saved, labels=["boat", "oak"])


def test_a_part_of_a_later_version_and_a_library_that_is_too_old(saved):
    about = json.loads((saved / "xmc_config.json").read_text())
    assert about["requires"] == ["sentence-transformers>=6.2"]
    assert about["requires"][0] in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    forge(saved, requires=["sentence-transformers>=99"])
    with pytest.raises(ValueError, match="sentence-transformers>=99 is required"):
        XMCModel.from_pretrained(saved)
    forge(saved, requires=about["requires"], parts={**about["parts"], "wings": {}})
    with pytest.raises(ValueError, match="holds wings, which this version does not know: update hf_xmc"):
        XMCModel.from_pretrained(saved)
    forge(saved, parts={**about["parts"], "calibration.json": {}})
    with pytest.raises(ValueError, match=r"names no file of calibration.json: the model is not whole"):
        XMCModel.from_pretrained(saved)


def test_the_pipeline_gives_dictionaries(model, saved):
    pipe = pipeline(saved)
    best = model.predict(TEXTS, top_k=2)
    assert pipe(TEXTS, top_k=2) == [
        [{"label": p.text, "score": p.score, "label_id": p.label_id} for p in ps] for ps in best
    ]
    assert [answer["label"] for answer in pipeline(model)(TEXTS[0])] == [p.text for p in model.predict(TEXTS[0])]
    with pytest.raises(ValueError, match=r"deny: settings of XMCModel.from_pretrained, got with a model"):
        pipeline(model, deny=["0"])


def test_bad_input_says_what_was_got(encoder, model):
    with pytest.raises(ValueError, match="there is no label"):
        XMCModel(encoder, [])
    with pytest.raises(ValueError, match=r"embeddings have shape \(3, 16\); expected \(11, 16\)"):
        XMCModel(encoder, LABELS, torch.zeros(3, 16))
    with pytest.raises(ValueError, match="an iterator of texts, got the one text 'a boat': put it in a list"):
        next(model.predict_stream("a boat"))
    with pytest.raises(ValueError, match=r"an iterator of texts, got a DataFrame\."):
        model.predict(pd.DataFrame({"text": ["a boat"]}))
    with pytest.raises(ValueError, match="text 1 is a NoneType; expected a string"):
        model.predict(["a", None])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        model.predict("a", top_k=0)
