"""Other backends. Their packages do not import with the tested set, so a stand-in replaces the loader of
sentence-transformers: it records what it gets, and embeds by torch."""

import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.tiny import LABELS, make_bert_encoder
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCModel, XMCTrainer, XMCTrainingArguments
from hf_xmc.cli import main
from hf_xmc.hub import backends
from hf_xmc.hub.backends import CLASSES

ONNX = "onnx/model.onnx"
INT8 = "onnx/model_qint8_avx512.onnx"
FILES = {
    ONNX: b"graph",
    INT8: b"small graph",
    "openvino/openvino_model.xml": b"net",
    "openvino/openvino_model.bin": b"w",
}


@pytest.fixture
def saved(bert_folder, tmp_path):
    XMCModel(make_bert_encoder(bert_folder), LABELS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def exported(saved):
    """A saved model with the files of both backends, which its manifest lists."""
    add_files(saved)
    XMCModel.from_pretrained(saved).save_pretrained(saved)
    return saved


def add_files(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the loader of sentence-transformers, with packages of both backends that import."""
    for name, kind in CLASSES.values():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        setattr(sys.modules[name], kind, object)
    calls = []

    def load(name, **settings):
        calls.append({"name": name, **settings})
        encoder = SentenceTransformer(name, device="cpu", local_files_only=True)
        encoder.backend = encoder[0].backend = settings["backend"]
        return encoder

    monkeypatch.setattr(backends, "SentenceTransformer", load)
    return calls


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_exactly_the_given_arguments_reach_sentence_transformers(exported, calls):
    int8 = {"file_name": "model_qint8_avx512.onnx"}
    XMCModel.from_pretrained(exported, backend="onnx", model_kwargs=int8, device="cpu")
    XMCModel.from_pretrained(exported, backend="openvino", model_kwargs={"ov_config": {}})
    XMCModel.from_pretrained(exported, model_kwargs={"dtype": "float32"}, device="cpu")
    common = {"name": str(exported), "local_files_only": True}
    cpu = {"provider": "CPUExecutionProvider"}
    assert calls == [
        {**common, "device": "cpu", "backend": "onnx", "model_kwargs": {**cpu, **int8}},
        {**common, "device": None, "backend": "openvino", "model_kwargs": {"ov_config": {}}},
        {**common, "device": "cpu", "backend": "torch", "model_kwargs": {"dtype": "float32"}},
    ]
    assert int8 == {"file_name": "model_qint8_avx512.onnx"}


@pytest.mark.parametrize(("device", "provider"), [("cuda:0", "CUDAExecutionProvider"), (None, None)])
def test_onnx_runs_where_the_device_says(exported, calls, device, provider):
    XMCModel.from_pretrained(exported, backend="onnx", device=device)
    assert (calls[0]["model_kwargs"] or {}).get("provider") == provider


def test_a_given_provider_is_kept(exported, calls):
    XMCModel.from_pretrained(exported, backend="onnx", device="cpu", model_kwargs={"provider": "OwnProvider"})
    assert calls[0]["model_kwargs"] == {"provider": "OwnProvider"}


def test_the_command_line_passes_the_same(exported, calls, capsys, monkeypatch):
    from hf_xmc.serving import server

    monkeypatch.setattr(server.uvicorn, "run", lambda *_, **__: None)
    options = ["--backend", "onnx", "--model_kwargs", '{"file_name": "model_qint8_avx512.onnx"}', "--device", "cpu"]
    table = exported.parent / "books.csv"
    table.write_text("text,labels\na red boat,boat\n")
    assert main(["predict", str(exported), "a red boat", *options]) == 0
    assert main(["evaluate", str(exported), str(table), "--text", "text", "--labels", "labels", *options]) == 0
    assert main(["serve", str(exported), *options]) == 0
    loaded = [(call["backend"], call["model_kwargs"]["file_name"], call["device"]) for call in calls]
    assert loaded == [("onnx", "model_qint8_avx512.onnx", "cpu")] * 3
    assert main(["predict", str(exported), "a red boat", "--model_kwargs", "[1]"]) == 1
    assert "--model_kwargs must be a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_missing_package_is_named_with_versions_before_anything_is_loaded(saved, backend, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optimum", None)  # as if it were not installed
    monkeypatch.setattr("hf_xmc.hub.repository.find", lambda *_, **__: pytest.fail("the model was read"))
    expected = rf"backend='{backend}'` needs {CLASSES[backend][0]}.*--no-deps.*optimum-"
    with pytest.raises(ModuleNotFoundError, match=expected):
        XMCModel.from_pretrained(saved, backend=backend)
    assert main(["predict", str(saved), "a text", "--backend", backend]) == 1
    assert f"`--backend {backend}` needs" in capsys.readouterr().err


def test_a_package_that_does_not_import_is_named_with_the_reason(saved, calls, monkeypatch):
    def broken(name):
        raise RuntimeError("cannot import name 'is_offline_mode'")

    monkeypatch.setattr(backends, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match=r"does not import here .cannot import name 'is_offline_mode'"):
        XMCModel.from_pretrained(saved, backend="onnx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "onnx"}, "`backend` must be left out for .*, got 'onnx': .* consists of StaticEmbedding"),
        ({"model_kwargs": {"dtype": "float16"}}, "`model_kwargs` must be left out for .* consists of StaticEmbedding"),
    ],
)
@pytest.mark.parametrize("release", [True, False])
def test_a_static_encoder_is_refused_before_it_is_loaded(encoder, settings, message, release, calls, tmp_path):
    if release:
        XMCModel(encoder, LABELS).save_pretrained(tmp_path / "static")
    else:
        encoder.save_pretrained(str(tmp_path / "static"))
    with pytest.raises(ValueError, match=message):
        XMCModel.from_pretrained(tmp_path / "static", **settings)
    assert not calls


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": "jax"}, ValueError, "`backend` must be one of torch, onnx, openvino, got 'jax'"),
        ({"model_kwargs": "fast"}, TypeError, "`model_kwargs` must be a dictionary, got 'fast'"),
        ({"backend": "openvino", "device": "cuda"}, ValueError, "`device` must be None or 'cpu'"),
        (
            {"backend": "onnx", "model_kwargs": {"file_name": "other.onnx"}},
            ValueError,
            "`file_name` is 'other.onnx', which .* does not have; it has onnx/model.onnx, onnx/model_qint8_avx512.onnx",
        ),
    ],
)
def test_arguments_that_do_not_apply_are_refused(exported, settings, error, message, calls):
    with pytest.raises(error, match=message):
        XMCModel.from_pretrained(exported, **settings)
    assert not calls


def test_a_backend_that_no_module_uses_is_refused(saved, calls, monkeypatch):
    monkeypatch.setattr(backends, "SentenceTransformer", lambda name, **_: SentenceTransformer(name, device="cpu"))
    with pytest.raises(ValueError, match="no module uses `backend='onnx'`"):
        XMCModel.from_pretrained(saved, backend="onnx")


def test_added_files_load_with_a_warning_from_their_backend_alone(saved, calls, caplog):
    add_files(saved)
    XMCModel.from_pretrained(saved)
    assert not warnings(caplog)
    XMCModel.from_pretrained(saved, backend="onnx")
    assert [Path(text.split()[0]).name for text in warnings(caplog)] == [Path(ONNX).name, Path(INT8).name]


def test_files_of_a_backend_are_kept_listed_and_checked(exported, calls, caplog, tmp_path):
    XMCModel.from_pretrained(exported, backend="onnx").save_pretrained(tmp_path / "again")
    for name, content in FILES.items():
        assert (tmp_path / "again" / name).read_bytes() == content
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (exported / weights).read_bytes()
    (tmp_path / "again" / INT8).write_bytes(b"other graph")
    XMCModel.from_pretrained(tmp_path / "again")  # torch does not read it
    with pytest.raises(ValueError, match=r"qint8_avx512.onnx is not the file that was saved"):
        XMCModel.from_pretrained(tmp_path / "again", backend="onnx")
    assert not warnings(caplog)


def test_files_of_a_backend_are_not_kept_with_other_weights(exported, caplog, tmp_path):
    model = XMCModel.from_pretrained(exported)
    model.encoder[0].model.embeddings.word_embeddings.weight.data[5] += 1
    model.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "onnx").exists()
    assert "are not saved: the weights are not those of" in warnings(caplog)[0]


def test_an_encoder_of_a_backend_without_torch_weights_is_not_saved(exported, calls, tmp_path):
    encoder = XMCModel.from_pretrained(exported, backend="onnx").encoder
    with pytest.raises(ValueError, match="does not save the weights of torch"):
        XMCModel(encoder, LABELS).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_training_an_encoder_of_a_backend_is_refused(exported, calls, queries, tmp_path):
    encoder = XMCModel.from_pretrained(exported, backend="onnx").encoder
    with pytest.raises(ValueError, match="loaded with `backend='onnx'`, which only predicts"):
        XMCTrainer(encoder, XMCTrainingArguments(tmp_path / "run"), queries, labels=LABELS)


@pytest.mark.parametrize("name", ["openvino/pytorch_model.bin", "model.onnx", "onnx/model.bin", "openvino/code.py"])
def test_other_files_are_still_refused(saved, calls, name):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="was not saved with the model, but a loader might read it"):
        XMCModel.from_pretrained(saved, backend="onnx")
