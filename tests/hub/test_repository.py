"""Push and pull with the real client, here and in processes of their own; faults on the way."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import dataset_layouts
from helpers.hub_server import Hub, point_client_at
from helpers.tiny import LABELS, make_static_encoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, AutoTokenizer, DistilBertConfig, DistilBertModel

from hf_xmc import FaissIndex, XMCModel, XMCTrainer, XMCTrainingArguments, load_xmc
from hf_xmc.hub.repository import push
from hf_xmc.metrics.calibration import Calibration

ROOT = Path(__file__).parents[2]
TEXTS = ["a red boat", "old oak tree"]


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture
def client(hub, tmp_path):
    """Run code where `model` stands for `XMCModel`, with a cache of its own."""

    def run(code, *arguments, cache="cache", succeeds=True, whole=False, **more):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            **more,
        }
        code = "import sys, json\nfrom hf_xmc import XMCModel, load_xmc\n" + code
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path, check=False
        )
        assert (done.returncode == 0) == succeeds, done.stderr[-5000:]
        lines = done.stdout.strip().splitlines()
        return lines if whole else lines[-1] if succeeds and lines else done.stderr

    return run


@pytest.fixture
def model():
    return XMCModel(make_static_encoder(), LABELS)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


PREDICT = "print(json.dumps(XMCModel.from_pretrained('org/boats', **json.loads(sys.argv[2])).predict({!r})))"
PREDICT = PREDICT.format(TEXTS)


def expected(model):
    return json.loads(json.dumps(model.predict(TEXTS)))


@pytest.fixture
def here(hub, monkeypatch):
    """The real client, in this process, pointed at the server; it waits for nobody."""
    point_client_at(hub.url, monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_push_and_pull_give_the_same_scores_and_stock_code_loads_the_encoder(hub, here, client, model, saved, tmp_path):
    code = f"address = XMCModel.from_pretrained(sys.argv[1]).push_to_hub('org/boats')\n{PREDICT}\nprint(address)"
    said = client(code, saved, "{}", cache="other", whole=True)
    address, predictions = said[-1], said[-2]
    assert address.startswith(f"{hub.url}/org/boats/commit/")
    assert set(hub.files("org/boats")) >= {"modules.json", "xmc_config.json", "label_index/embeddings.safetensors"}
    assert not [name for name in hub.files("org/boats") if name.endswith((".bin", ".py", ".pkl"))]
    assert json.loads(predictions) == expected(model)
    del hub.requests[:]
    offline = client(PREDICT, "-", "{}", cache="other", HF_HUB_OFFLINE="1")
    assert json.loads(offline) == expected(model)
    assert hub.requests == []

    stock = SentenceTransformer("org/boats", cache_folder=str(tmp_path / "third"), token="hf_test", device="cpu")
    assert stock.encode("a red boat").tolist() == pytest.approx(model.encoder.encode("a red boat").tolist())
    assert hub.requests
    assert not [line for line in hub.requests if "label_index" in line], "the encoder alone needs no index"


def test_revisions_and_pull_requests(hub, here, model, saved, tmp_path):
    settings = {"cache_dir": tmp_path / "cache", "token": "hf_test"}
    push(saved, "org/boats", revision="v2", private=True, token="hf_test")
    assert "xmc_config.json" not in hub.files("org/boats")
    assert XMCModel.from_pretrained("org/boats", revision="v2", **settings).predict(TEXTS) == model.predict(TEXTS)
    assert push(saved, "org/boats", create_pr=True, token="hf_test").endswith("/discussions/1")
    assert "xmc_config.json" not in hub.files("org/boats")
    with pytest.raises(ValueError, match=r"org/boats has no xmc_config.json, and does not load as a model of sent"):
        XMCModel.from_pretrained("org/boats", **settings)


def test_new_release_replaces_the_old_one(hub, here, saved):
    hub.put("org/boats", {"pytorch_model.bin": b"old", "1_Pooling/config.json": b"{}", "README.md": b"mine"})
    push(saved, "org/boats", token="hf_test")
    listed = json.loads((saved / "xmc_config.json").read_text())["files"]
    assert set(hub.files("org/boats")) == {*listed, "xmc_config.json", "README.md"}


FAULTS = {
    "create fails": ["POST", "repos/create", "error", 99],
    "preupload fails": ["POST", "preupload", "error", 99],
    "upload fails": ["PUT", "_lfs", "error", 99],
    "upload is cut": ["PUT", "_lfs", "cut", 99],
    "commit is cut": ["POST", "commit/main", "cut", 99],
    "commit fails": ["POST", "commit/main", "error", 99],
    "someone else commits first": ["POST", "commit/main", "race", 1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_push_keeps_the_old_release_and_the_local_model(fault, hub, here, model, saved, tmp_path):
    push(saved, "org/boats", token="hf_test")
    before = hub.files("org/boats")
    other = XMCModel(make_static_encoder(dim=8), LABELS)
    other.save_pretrained(tmp_path / "new")
    mine = {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    hub.faults.append(list(FAULTS[fault]))
    with pytest.raises(RuntimeError, match=r"(?s)the push to org/boats failed .* unchanged. Push again"):
        push(tmp_path / "new", "org/boats", token="hf_test")
    after = hub.files("org/boats")
    assert {name: after[name] for name in before} == before
    pulled = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "one", token="hf_test")
    assert pulled.predict(TEXTS) == model.predict(TEXTS)
    assert {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()} == mine
    hub.faults.clear()
    push(tmp_path / "new", "org/boats", token="hf_test")
    pulled = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "two", token="hf_test")
    assert pulled.predict(TEXTS) == other.predict(TEXTS)


def test_lost_answer_leaves_the_complete_new_release(hub, here, saved, tmp_path):
    push(saved, "org/boats", token="hf_test")
    other = XMCModel(make_static_encoder(dim=8), LABELS)
    other.save_pretrained(tmp_path / "new")
    hub.faults.append(["POST", "commit/main", "lost", 1])
    with pytest.raises(RuntimeError, match=r"(?s)the push to org/boats failed .* unchanged. Push again"):
        push(tmp_path / "new", "org/boats", token="hf_test")
    pulled = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "one", token="hf_test")
    assert pulled.predict(TEXTS) == other.predict(TEXTS)
    push(tmp_path / "new", "org/boats", token="hf_test")
    pulled = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "two", token="hf_test")
    assert pulled.predict(TEXTS) == other.predict(TEXTS)


def test_trainer_publishes_only_the_release(hub, here, queries, tmp_path):
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 2,
        "save_steps": 1,
        "push_to_hub": True,
        "hub_model_id": "org/trained",
        "hub_token": "hf_test",
    }
    args = XMCTrainingArguments(str(tmp_path / "run"), hub_strategy="every_save", **settings)
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)
    trainer.train()
    assert len(hub.repositories["model", "org/trained"].commits) == 3  # the first, empty one, and one a save
    assert not [name for name in hub.files("org/trained") if name.endswith((".bin", ".pt", ".pth"))]
    assert (tmp_path / "run" / "checkpoint-2" / "training_args.bin").exists()
    trainer.push_to_hub()
    pulled = XMCModel.from_pretrained("org/trained", cache_dir=tmp_path / "cache", token="hf_test")
    assert pulled.predict(TEXTS) == XMCModel(trainer.model, LABELS).predict(TEXTS)
    args = XMCTrainingArguments(str(tmp_path / "run"), hub_strategy="all_checkpoints", **settings)
    with pytest.raises(ValueError, match="got all_checkpoints, which would publish pickles"):
        XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)


def test_train_push_and_predict_with_only_the_package(hub, here, client, queries, tmp_path):
    """Another process, another cache, and of this repository nothing but the files that are installed."""
    args = XMCTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=2, save_strategy="no")
    trainer = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)
    trainer.train()
    model = XMCModel(trainer.model, LABELS)
    model.remember(queries)
    model.push_to_hub("org/boats", token="hf_test")
    assert [name for name in hub.files("org/boats") if name.startswith("training_memory/")]
    card = hub.files("org/boats")["README.md"].decode()
    assert ('from_pretrained("org/boats")' in card, "org/name" in card) == (True, False)
    pyproject = (ROOT / "pyproject.toml").read_text()
    package, data = re.search(r"package-data\]\n(\w+) = (\[.*?\n?\])\n", pyproject, flags=re.DOTALL).groups()
    for pattern in ["**/*.py", *ast.literal_eval(data)]:
        for path in (ROOT / package).glob(pattern):
            copy = tmp_path / "site" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    code = f"""
import hf_xmc
assert hf_xmc.__file__.startswith(sys.argv[1]), hf_xmc.__file__
model = XMCModel.from_pretrained('org/boats', device='cpu')
model.save_pretrained('again')
print(json.dumps([model.predict({TEXTS!r}), XMCModel.from_pretrained('again', device='cpu').predict({TEXTS!r})]))
"""
    found = json.loads(client(code, tmp_path / "site", cache="other", PYTHONPATH=str(tmp_path / "site")))
    assert found == [expected(model), expected(model)]


def test_failed_download_leaves_nothing_that_loads(hub, here, model, saved, tmp_path):
    push(saved, "org/boats", token="hf_test")
    for name in ("xmc_config.json", "modules.json", "embeddings.safetensors"):
        for kind in ("error", "cut"):
            cache = {"cache_dir": tmp_path / f"{kind} {name}", "token": "hf_test"}
            hub.faults.append(["GET", f"resolve/.*{name}", kind, 99])
            with pytest.raises(Exception, match=r"(?i)500|not found|incomplete|consistency|closed|disconnect|body"):
                XMCModel.from_pretrained("org/boats", **cache)
            hub.faults.clear()
            assert XMCModel.from_pretrained("org/boats", **cache).predict(TEXTS) == model.predict(TEXTS)


def test_download_survives_a_slow_body_and_one_failure(hub, here, model, saved, tmp_path):
    push(saved, "org/boats", token="hf_test")
    hub.faults += [["GET", "embeddings.safetensors", "slow", 1], ["GET", "model.safetensors", "cut", 1]]
    pulled = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "cache", token="hf_test")
    assert pulled.predict(TEXTS) == model.predict(TEXTS)
    assert [fault[3] for fault in hub.faults] == [0, 0]


def test_incomplete_upload_is_refused(hub, here, saved, tmp_path):
    whole = {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    hub.put("org/boats", {name: content for name, content in whole.items() if "embeddings" not in name})
    with pytest.raises(ValueError, match=r"embeddings.safetensors is missing: get the model again"):
        XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "one", token="hf_test")
    hub.put("org/later", {name: content for name, content in whole.items() if name != "xmc_config.json"})
    with pytest.raises(ValueError, match=r"org/later has a label_index but no xmc_config.json: it was not saved"):
        XMCModel.from_pretrained("org/later", cache_dir=tmp_path / "one", token="hf_test")


def put_folder(hub, name, folder):
    hub.put(name, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def test_plain_encoder_of_the_hub_takes_labels(hub, here, model, saved, tmp_path, caplog):
    model.encoder.save_pretrained(str(tmp_path / "plain"))
    put_folder(hub, "org/plain", tmp_path / "plain")
    cache = {"cache_dir": tmp_path / "cache", "token": "hf_test"}
    plain = XMCModel.from_pretrained("org/plain", **cache)
    assert "org/plain is an encoder without labels, and predicts nothing yet" in caplog.text
    assert plain.encoder.encode("boat").tolist() == model.encoder.encode("boat").tolist()
    assert XMCModel.from_pretrained("org/plain", labels=LABELS, **cache).predict(TEXTS) == model.predict(TEXTS)
    push(saved, "org/boats", token="hf_test")
    del hub.requests[:]
    other = XMCModel.from_pretrained("org/boats", labels=["boat", "oak"], **cache)
    assert other.predict(TEXTS) == XMCModel(model.encoder, ["boat", "oak"]).predict(TEXTS)
    fetched = fetched_from(hub)
    assert "model.safetensors" in fetched
    assert not {"embeddings.safetensors", "labels.parquet"} & fetched


def test_faiss_index_is_pushed_and_pulled(hub, here, tmp_path):
    labels = [f"{label} {number}" for number in range(12) for label in LABELS]
    model = XMCModel(make_static_encoder(), labels)
    model.index = FaissIndex(model.index.embeddings, "HNSW4", effort=2, refine=1)
    model.remove_labels(["5"])
    model.push_to_hub("org/boats", token="hf_test")
    assert "label_index/faiss.safetensors" in hub.files("org/boats")
    pulled = XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "whole", token="hf_test")
    assert type(pulled.index) is FaissIndex
    assert pulled.predict(TEXTS) == model.predict(TEXTS)


def test_only_the_wanted_parts_are_downloaded(hub, here, model, queries, tmp_path, caplog):
    model.remember(queries)
    model.calibration = Calibration((0.0, 1.0), (0.1, 0.9))
    model.push_to_hub("org/boats", token="hf_test")

    def pulled(parts, cache, **settings):
        del hub.requests[:]
        settings = {"parts": parts, "cache_dir": tmp_path / cache, "token": "hf_test", **settings}
        return XMCModel.from_pretrained("org/boats", **settings), fetched_from(hub)

    index, rest = {"labels.parquet", "embeddings.safetensors"}, {"texts.parquet", "calibration.json"}
    caplog.clear()
    encoder, fetched = pulled((), "encoder")
    assert "model.safetensors" in fetched
    assert not (index | rest) & fetched
    assert (len(encoder.labels), encoder.memory, encoder.calibration) == (0, None, None)
    assert encoder.encoder.encode("boat").tolist() == model.encoder.encode("boat").tolist()
    assert "without labels" not in caplog.text  # the encoder alone was asked for
    with pytest.raises(ValueError, match="the model has no label to predict"):
        encoder.predict(TEXTS)
    lean, fetched = pulled(["label_index"], "lean")
    assert fetched & (index | rest) == index
    assert (lean.memory, lean.calibration) == (None, None)
    model.memory = None
    assert lean.predict(TEXTS) == model.predict(TEXTS)
    whole, fetched = pulled(None, "lean")
    assert fetched & (index | rest) == {"texts.parquet", "embeddings.safetensors", "calibration.json"}  # of the memory
    assert len(whole.memory) == len(queries)
    assert whole.calibration is not None
    again, _ = pulled((), "lean")  # the other parts are in the cache, and are not read
    assert (len(again.labels), again.memory) == (0, None)
    other, fetched = pulled(None, "other", labels=["boat", "oak"])
    assert not (index | rest) & fetched
    assert len(other.labels) == 2
    offline, fetched = pulled((), "lean", local_files_only=True)
    assert (len(offline.labels), fetched) == (0, set())


def test_parts_that_cannot_be_read_are_refused(model, queries, tmp_path):
    def refusal(parts, **settings):
        with pytest.raises(ValueError, match="`parts`") as error:
            XMCModel.from_pretrained(tmp_path / "model", parts=parts, **settings)
        return str(error.value)

    model.remember(queries)
    model.save_pretrained(tmp_path / "model")
    assert refusal("label_index").endswith("got the single text 'label_index'. Put it in a list.")
    assert refusal(["label_index/*"]) == (
        "`parts` must hold names out of label_index, training_memory, calibration, new_labels, got 'label_index/*'."
    )
    assert refusal(["training_memory"]) == (
        "`parts` must hold 'label_index' too, which training_memory needs, got ['training_memory']."
    )
    assert "does not have; it has label_index, training_memory" in refusal(["label_index", "calibration"])
    assert "must be None with `labels`" in refusal(["label_index"], labels=["boat"])
    model.calibrate(queries)
    model.save_pretrained(tmp_path / "model")
    assert "`parts` must hold 'training_memory' too: the calibration of" in refusal(["label_index", "calibration"])
    model.memory = None
    model.calibrate(queries)
    model.save_pretrained(tmp_path / "model")  # there is no memory that the calibration depends on
    loaded = XMCModel.from_pretrained(tmp_path / "model", parts=["label_index", "calibration"])
    assert loaded.calibration == model.calibration
    model.encoder.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"`parts` must be \(\) or None for .*plain, an encoder without any part"):
        XMCModel.from_pretrained(tmp_path / "plain", parts=["label_index"])
    assert len(XMCModel.from_pretrained(tmp_path / "plain", parts=()).labels) == 0


def fetched_from(hub):
    lines = [line for line in hub.requests if line.startswith("GET") and "resolve" in line]
    return {line.rsplit("/", maxsplit=1)[-1] for line in lines}


NORMALISED = {
    "quicktensor/dexml_eurlex-4k": True,
    "quicktensor/dexml_lf-amazontitles-131k": True,
    "quicktensor/dexml_lf-wikipedia-500k": False,
    "quicktensor/dexml_lf-amazontitles-1.3m": False,
}


@pytest.mark.parametrize("layout", ["sentence-transformers", "transformers"])
def test_checkpoints_of_the_paper_get_their_pooling_and_norm(hub, here, layout, tmp_path, bert_folder):
    """Made in their layout: DistilBERT, with and without the files of sentence-transformers, which say mean pooling."""
    distilbert = make_distilbert(tmp_path / "distilbert", bert_folder)
    if layout == "sentence-transformers":
        stock = SentenceTransformer(modules=[Transformer(str(distilbert)), Pooling(16, "mean")], device="cpu")
        distilbert = tmp_path / "stock"
        stock.save_pretrained(str(distilbert))
    for name in NORMALISED:
        put_folder(hub, name, distilbert)
    settings = {"cache_dir": tmp_path / "cache", "token": "hf_test", "device": "cpu"}
    models = [XMCModel.from_pretrained(name, labels=LABELS, **settings) for name in NORMALISED]
    models[0].save_pretrained(tmp_path / "saved")
    again = XMCModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.predict("boat") == models[0].predict("boat")
    assert {model.encoder.similarity_fn_name for model in (*models, again)} == {"dot"}
    tokenizer, plain = AutoTokenizer.from_pretrained(distilbert), AutoModel.from_pretrained(distilbert)
    with torch.no_grad():
        tokens = tokenizer(LABELS, padding=True, return_tensors="pt")
        expected = plain(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[:, 0]
    for normalised, model in zip(NORMALISED.values(), models, strict=True):
        wanted = torch.nn.functional.normalize(expected, dim=1) if normalised else expected
        torch.testing.assert_close(model.index.embeddings, wanted, rtol=1e-4, atol=1e-5)


def make_distilbert(folder, bert_folder):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40
    )
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_missing_repository_and_revision_are_errors(hub, here, tmp_path, monkeypatch):
    def pull(**settings):
        XMCModel.from_pretrained("org/boats", cache_dir=tmp_path / "cache", token="hf_test", **settings)

    with pytest.raises(ValueError, match="'org/boats' is neither a folder here nor a model"):
        pull()
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="org/boats is not in the local cache"):
            pull()
    hub.put("org/boats", {"README.md": b"mine"})
    with pytest.raises(ValueError, match="org/boats has no revision 'nope'; expected a branch, a tag or a commit"):
        pull(revision="nope")


LOAD_DATA = """
data = load_xmc('org/data')
rows = {name: [[r['text'], r['label_ids']] for r in data.split(name)] for name in sys.argv[1:]}
pairs = {name: p.tolist() for name, p in data.filter_pairs.items()}
print(json.dumps([rows, data.labels['text'][:], data.labels['uid'][:], pairs]))
"""


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    dataset_layouts.write_raw(tmp_path / "data")
    return tmp_path / "data"


def test_data_set_is_pushed_and_loaded(hub, here, client, data):
    load_xmc(data).push_to_hub("org/data", token="hf_test")
    rows, labels, ids, pairs = json.loads(client(LOAD_DATA, "train", "test", cache="other"))
    assert rows["train"] == [[text, ids] for text, ids in dataset_layouts.TRAIN]
    assert rows["test"] == [[text, ids] for text, ids in dataset_layouts.TEST]
    assert (labels, ids[0], pairs) == (dataset_layouts.LABELS, "L0", {"test": dataset_layouts.FILTER_PAIRS})


def test_pushed_data_set_replaces_another_and_keeps_its_card(hub, here, data, tmp_path):
    card = b"---\nlicense: mit\ndataset_info: {splits: [{name: train, num_examples: 99}]}\n---\n# Mine\n"
    old = {"README.md": card, "default/train-00000-of-00001.parquet": b"old", "default/validation.parquet": b"old"}
    hub.put("org/data", {**old, "LICENSE": b"mit"}, kind="dataset")
    load_xmc(data).push_to_hub("org/data", token="hf_test")
    files = hub.files("org/data", "dataset")
    tables = {"default/train.parquet", "default/test.parquet", "labels/train.parquet", "filter_pairs/test.parquet"}
    assert set(files) == {"README.md", "LICENSE", *tables}
    _, metadata, text = files["README.md"].decode().split("---\n")
    assert text == "# Mine\n"
    assert yaml.safe_load(metadata).keys() == {"license", "configs"}
    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert load_xmc(tmp_path / "copy").labels["text"][:] == dataset_layouts.LABELS


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_push_of_data_keeps_the_old_data_set(fault, hub, here, data):
    data = load_xmc(data)
    data.push_to_hub("org/data", token="hf_test")
    before = hub.files("org/data", "dataset")
    other = replace(data, labels=data.labels.select([4, 3, 2, 1, 0]), test=None, filter_pairs={})
    hub.faults.append(list(FAULTS[fault]))
    with pytest.raises(RuntimeError, match=r"(?s)the push to org/data failed .* unchanged. Push again"):
        other.push_to_hub("org/data", token="hf_test")
    after = hub.files("org/data", "dataset")
    assert {name: after[name] for name in before} == before
    hub.faults.clear()
    other.push_to_hub("org/data", token="hf_test")
    after = hub.files("org/data", "dataset")
    assert {name for name in after if name.endswith(".parquet")} == {"default/train.parquet", "labels/train.parquet"}
    assert after["labels/train.parquet"] != before["labels/train.parquet"]
