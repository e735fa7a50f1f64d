"""Releases made to harm, or damaged on the way: each is refused with a sentence, and nothing of it is executed."""

import json
import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tampering import forge
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from safetensors.torch import save_file

from hf_xmc import FaissIndex, XMCModel
from hf_xmc.hub import manifest, release, repository
from hf_xmc.metrics.calibration import Calibration


@pytest.fixture
def saved(tmp_path):
    XMCModel(make_static_encoder(), LABELS).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def saved_bert(bert_folder, queries, tmp_path):
    """A release of all files there are: tokenizer, pooling, configurations, an index of FAISS, memory, calibration."""
    model = XMCModel(make_bert_encoder(bert_folder), LABELS)
    model.remember(queries)
    model.calibration = Calibration((0.0, 1.0), (0.1, 0.9))
    model.index = FaissIndex(model.index.embeddings, "HNSW4")
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "exploded").exists(), "a pickle was executed"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


PICKLE = pickle.dumps(Bomb())
HUGE_HEADER = (2**62).to_bytes(8, "little") + b"{}"
DEEP = b"[" * 100_000
# What stock loaders look for beside the files of a release.
PROBED = [
    "pytorch_model.bin",
    "model.pkl",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "modeling.py",
    "configuration.py",
    "training_args.bin",
    "optimizer.pt",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "spiece.model",
    "1_Pooling/pytorch_model.bin",
    "label_index/index.npy",
    "label_index/index.faiss",
    "training_memory/embeddings.npy",
]


REFUSALS = ("get the model again", "is not a manifest", "has format", "not saved, or not uploaded, to the end")


def every_file(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def damages(content, other):
    middle = len(content) // 2
    yield "changed", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    yield "truncated", content[:-1]
    yield "emptied", b""
    yield "lengthened", content + b"x"
    yield "exchanged", other
    yield "missing", None


def refusal(folder):
    """What the loader says of a release that it refuses; nothing where it does not."""
    try:
        XMCModel.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return ""


def test_damage_to_any_file_is_refused(saved_bert, caplog):
    predictions = XMCModel.from_pretrained(saved_bert).predict("a red boat")
    names = [name for name in every_file(saved_bert) if name != "README.md"]  # the card is for people, who may edit it
    assert len(names) > 12
    contents = {name: (saved_bert / name).read_bytes() for name in names}
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        for what, content in damages(contents[name], contents[other]):
            if content is None:
                (saved_bert / name).unlink()
            else:
                (saved_bert / name).write_bytes(content)
            if name == manifest.LAYOUT.faiss:
                caplog.clear()
                assert XMCModel.from_pretrained(saved_bert).predict("a red boat") == predictions
                assert "the index is rebuilt from the embeddings" in caplog.text
                continue
            said = refusal(saved_bert)
            assert any(sentence in said for sentence in REFUSALS), f"{name}, {what}: {said or 'was loaded'}"
        (saved_bert / name).write_bytes(contents[name])
    assert XMCModel.from_pretrained(saved_bert).predict("a red boat")


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json", "./modules2.json", "", "."],
)
def test_file_names_outside_the_folder_are_refused(saved, name):
    forge(saved, {name: None})
    with pytest.raises(ValueError, match=r"which is not a file in the folder of the model"):
        XMCModel.from_pretrained(saved)


@pytest.mark.parametrize("content", [PICKLE, HUGE_HEADER, DEEP, b""], ids=["pickle", "huge header", "deep", "empty"])
def test_malicious_content_of_any_file_is_refused(saved_bert, content, nothing_runs, caplog):
    before = {name: (saved_bert / name).read_bytes() for name in every_file(saved_bert)}
    for name in json.loads(before[manifest.LAYOUT.config])["files"]:
        forge(saved_bert, {name: content})
        caplog.clear()
        said = refusal(saved_bert) or caplog.text
        expected = ("holds no such index",) if name == manifest.LAYOUT.faiss else ("does not load", "does not hold")
        assert any(sentence in said for sentence in expected), f"{name}: {said or 'was loaded'}"
        (saved_bert / name).write_bytes(before[name])
        (saved_bert / manifest.LAYOUT.config).write_bytes(before[manifest.LAYOUT.config])


@pytest.mark.parametrize("name", PROBED)
def test_pickle_is_not_loaded_under_any_name(saved, name, nothing_runs):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(PICKLE)
    assert "was not saved with the model" in refusal(saved)
    forge(saved, {name: PICKLE})
    said = refusal(saved)
    if name.endswith(tuple(manifest.LOADED)):  # a file that a release may have: refused, or read as what it is not
        assert not said or "does not load" in said
    else:
        assert "a release holds .jinja, .json, .model, .parquet, .safetensors, .txt and nothing else" in said


def test_swapped_encoder_is_refused(saved, tmp_path):
    """With its files alone, with its part of the manifest too, and with a manifest that calls it the old one."""
    other = make_static_encoder()
    with torch.no_grad():
        other[0].embedding.weight.neg_()
    XMCModel(other, LABELS).save_pretrained(tmp_path / "other")
    about, theirs = (
        json.loads((folder / manifest.LAYOUT.config).read_text()) for folder in (saved, tmp_path / "other")
    )
    for name in manifest.files_of_part(about["files"], None):
        shutil.copy(tmp_path / "other" / name, saved / name)
        about["files"][name] = theirs["files"][name]
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was saved"):
        XMCModel.from_pretrained(saved)
    (saved / manifest.LAYOUT.config).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"xmc_config.json is not the file that was saved"):
        XMCModel.from_pretrained(saved)
    about["digest"] = manifest.digest_of(about)
    (saved / manifest.LAYOUT.config).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="the encoder is not the one that made the label embeddings"):
        XMCModel.from_pretrained(saved)


def test_embeddings_of_other_labels_are_refused(saved, tmp_path):
    save_file({"embeddings": torch.zeros(3, 16)}, tmp_path / "x.safetensors")
    forge(saved, {"label_index/embeddings.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    with pytest.raises(
        ValueError, match=r"11 labels and embeddings of shape \(3, 16\); xmc_config.json says \(11, 16\)"
    ):
        XMCModel.from_pretrained(saved)
    save_file({"something else": torch.zeros(11, 16)}, tmp_path / "x.safetensors")
    forge(saved, {"label_index/embeddings.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    with pytest.raises(
        ValueError,
        match=r"does not hold label_index.labels.parquet and label_index.embeddings.safetensors as they were saved",
    ):
        XMCModel.from_pretrained(saved)


def test_label_table_with_other_columns_is_refused(saved, nothing_runs):
    """A column of texts may not turn into a column of files to open, nor anything but a table of labels be read."""
    texts, ids = pa.array(LABELS), pa.array([str(row) for row in range(11)])
    path = saved / "label_index" / "labels.parquet"

    def said_of(table):
        pq.write_table(table, path)
        forge(saved, {"label_index/labels.parquet": path.read_bytes()})
        return refusal(saved)

    assert 'Field "text" does not exist' in said_of(pa.table({"uid": ids}))
    assert 'Field "uid" does not exist' in said_of(pa.table({"text": texts}))
    assert "column text is of type int64" in said_of(pa.table({"uid": ids, "text": range(11)}))
    images = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 11)
    assert "column text is of type struct" in said_of(pa.table({"uid": ids, "text": images}))
    assert "column seen is of type string" in said_of(pa.table({"uid": ids, "text": texts, "seen": texts}))
    assert "column uid is of type list" in said_of(pa.table({"uid": [["a"]] * 11, "text": texts}))

    table = pa.table({"uid": ids, "text": ["/etc/passwd"] * 11, "other": images, "seen": [True] * 11})
    for kind in ("Image", "Value"):  # the second lacks the type that it must name
        claims = {"info": {"features": {name: {"_type": kind} for name in ("uid", "text", "other")}}}
        assert not said_of(table.replace_schema_metadata({"huggingface": json.dumps(claims)}))
        labels, _ = release.read_label_index(release.load(repository.find(saved)))
        assert labels[0] == {"uid": "0", "text": "/etc/passwd", "seen": True}


def test_foreign_modules_are_refused(saved):
    modules = json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]).encode()
    forge(saved, {"modules.json": modules})
    with pytest.raises(ValueError, match=r"(?s)the encoder does not load .*evil.Module"):
        XMCModel.from_pretrained(saved)
