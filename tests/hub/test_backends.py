"""Other backends. Their packages do not import with the tested set, so a stand-in replaces the loader of
sentence-transformers: it records what it gets, embeds by torch, and saves what Optimum saves: no weights of torch."""

import logging
import re
import sys
from functools import partial
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest
from helpers.hub_server import Hub, point_client_at
from helpers.tiny import LABELS, make_bert_encoder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCModel, XMCTrainer, XMCTrainingArguments
from hf_xmc.cli import main
from hf_xmc.hub import backends
from hf_xmc.hub.backends import CLASSES, WORKING

ONNX = "onnx/model.onnx"
INT8 = "onnx/model_qint8_avx512.onnx"
FILES = {
    ONNX: b"graph",
    INT8: b"small graph",
    "openvino/openvino_model.xml": b"net",
    "openvino/openvino_model.bin": b"w",
    "openvino/openvino_model_int8.xml": b"small net",
    "openvino/openvino_model_int8.bin": b"s",
}
SAVED = {  # whatever the name of the file that was loaded
    "onnx": {ONNX: b"saved graph"},
    "openvino": {
        "openvino/openvino_model.xml": b"saved net",
        "openvino/openvino_model.bin": b"saved w",
        "openvino/openvino_config.json": b"{}",  # if the loaded net is quantised
    },
}
INT8_FILES = [("onnx", Path(INT8).name), ("openvino", "openvino_model_int8.xml")]
TEXTS = ["a red boat", "the old town by the sea"]


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


def add_files(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder):
    """Return the content of each file of an encoder, and of its labels."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("xmc_config.json", "README.md")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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
        encoder.backend = encoder[0].backend = backend = settings["backend"]
        if backend in SAVED:
            encoder[0].model.save_pretrained = partial(save, encoder[0].model.config, SAVED[backend])
        return encoder

    def save(config, files, folder, **_):
        config.save_pretrained(folder)
        add_files(Path(folder), files)

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


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_named_versions_are_versions_that_this_package_accepts(backend):
    commands = re.findall(r"`pip (install [^`]+)`", WORKING[backend])
    pinned = dict(re.findall(r"(\S+)==(\S+)", " ".join(commands)))
    accepted = {canonicalize_name(each.name): each.specifier for each in map(Requirement, requires("hf_xmc"))}
    assert len(commands) == 2
    assert commands[1].startswith("install --no-deps")
    assert all(version in accepted.get(canonicalize_name(name), version) for name, version in pinned.items())
    assert ({"transformers", "huggingface_hub"} <= set(pinned)) is (backend == "openvino")


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


@pytest.mark.parametrize(("backend", "file"), INT8_FILES)
def test_saving_or_pushing_a_model_of_a_backend_keeps_all_files(
    exported, calls, caplog, backend, file, tmp_path, monkeypatch
):
    model = XMCModel.from_pretrained(exported, backend=backend, model_kwargs={"file_name": file}, device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(exported)
    assert {*FILES, "model.safetensors"} < set(contents(exported))
    model.save_pretrained(exported)  # in place
    assert contents(exported) == contents(tmp_path / "again")
    for settings in ({"backend": backend, "model_kwargs": {"file_name": file}}, {}):
        again = XMCModel.from_pretrained(tmp_path / "again", device="cpu", **settings)
        assert again.predict(TEXTS) == model.predict(TEXTS)
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    model.push_to_hub("org/boats", token="hf_test")
    pushed = hub.files("org/boats")
    assert {name: pushed[name] for name in contents(exported)} == contents(exported)
    hub.shutdown()
    assert not warnings(caplog)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_an_export_is_kept_if_the_saved_model_has_no_file_of_the_backend(saved, calls, caplog, backend, tmp_path):
    XMCModel.from_pretrained(saved, backend=backend, device="cpu").save_pretrained(tmp_path / "again")
    before, after = contents(saved), contents(tmp_path / "again")
    assert set(after) == {*before, *SAVED[backend]}
    expected = {"model.safetensors": before["model.safetensors"], **SAVED[backend]}
    assert {name: after[name] for name in expected} == expected
    XMCModel.from_pretrained(tmp_path / "again", backend=backend, device="cpu")
    XMCModel.from_pretrained(tmp_path / "again", device="cpu")
    assert not warnings(caplog)  # the manifest lists the export


def test_files_of_a_backend_that_were_not_downloaded_are_named(exported, calls, caplog, tmp_path, monkeypatch):
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    XMCModel.from_pretrained(exported, device="cpu").push_to_hub("org/boats", token="hf_test")
    assert not warnings(caplog)
    pulled = XMCModel.from_pretrained("org/boats", backend="onnx", cache_dir=tmp_path / "cache", token="hf_test")
    pulled.save_pretrained(tmp_path / "again")
    hub.shutdown()
    openvino = sorted(name for name in FILES if name.startswith("openvino/"))
    assert set(contents(exported)) - set(contents(tmp_path / "again")) == set(openvino)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{', '.join(openvino)} are not saved:")
    assert "was downloaded without them" in warning


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_plain_encoder_of_a_backend_is_neither_saved_nor_pushed(bert_folder, calls, backend, tmp_path, monkeypatch):
    make_bert_encoder(bert_folder).save_pretrained(str(tmp_path / "plain"))
    model = XMCModel.from_pretrained(tmp_path / "plain", labels=LABELS, backend=backend, device="cpu")
    advice = f"backend='{backend}'`, which does not save .* Load it with `backend='torch'`, save it, and load that"
    with pytest.raises(ValueError, match=advice):
        model.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    with pytest.raises(ValueError, match=advice):
        model.push_to_hub("org/boats", token="hf_test")
    assert not hub.requests
    hub.shutdown()


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
