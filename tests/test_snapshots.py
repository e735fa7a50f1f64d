"""The Hub out of reach, and caches that hold a part: what is cached is used at once; what is unknown is an error."""

import shutil

import pytest
from conftest import LABELS, make_bert_encoder, make_static_encoder
from hub_server import Hub, point_client_at
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCModel
from hf_xmc.hub import repository
from hf_xmc.hub.snapshots import Snapshot

TEXTS = ["a red boat", "old oak tree"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def server(monkeypatch):
    """The real client, in this process, pointed at a server; nothing may wait for an answer that does not come."""
    server, waits = Hub(), []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    server.waits = waits

    def reach(url=server.url, offline=False):
        point_client_at(url, monkeypatch, offline)
        del server.requests[:], server.waits[:]

    server.reach = reach
    reach()
    yield server
    server.shutdown()


@pytest.fixture
def model():
    return XMCModel(make_static_encoder(), LABELS)


def put_folder(server, name, folder):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return server.put(name, files)


@pytest.fixture
def boats(server, model, tmp_path):
    """A release; its commit."""
    model.save_pretrained(tmp_path / "boats")
    return put_folder(server, "org/boats", tmp_path / "boats")


@pytest.fixture
def plain(server, tmp_path, bert_folder):
    """An encoder of sentence-transformers; its commit."""
    make_bert_encoder(bert_folder).save_pretrained(str(tmp_path / "plain"))
    return put_folder(server, "org/plain", tmp_path / "plain")


@pytest.fixture
def get(tmp_path):
    def get(name="org/boats", **settings):
        settings = {"cache_dir": tmp_path / "cache", "token": "hf_test", "device": "cpu", **settings}
        return XMCModel.from_pretrained(name, **settings)

    return get


# Ways in which the Hub does not answer; the last is wanted.
AWAY = {"down": {"url": NOWHERE}, "offline": {"offline": True}, "local_files_only": {}}


def away(server, way):
    server.reach(**AWAY[way])
    return {"local_files_only": True} if way == "local_files_only" else {}


@pytest.mark.parametrize("way", AWAY)
def test_what_is_cached_is_used_at_once(way, server, model, boats, plain, get, caplog):
    server.repositories["model", "org/boats"].refs |= {"v1": boats}
    found = get("org/plain", labels=LABELS).predict(TEXTS)
    revisions = [None, "main", "v1", boats]
    for revision in revisions:
        get(revision=revision)
    caplog.clear()
    settings = away(server, way)
    for revision in revisions:
        assert get(revision=revision, **settings).predict(TEXTS) == model.predict(TEXTS)
    assert get("org/plain", labels=LABELS, **settings).predict(TEXTS) == found
    assert get("org/plain", **settings).labels.num_rows == 0
    assert (server.requests, server.waits) == ([], [])
    assert ("org/plain: the Hub did not give it" in caplog.text) == (way == "down")


def test_a_commit_that_is_cached_needs_no_request(server, model, boats, get):
    get(revision=boats)
    server.reach()
    assert get(revision=boats).predict(TEXTS) == model.predict(TEXTS)
    assert server.requests == []


@pytest.mark.parametrize("way", AWAY)
def test_what_was_never_cached_is_an_error(way, server, boats, get, tmp_path):
    settings = away(server, way)
    for more in ({}, {"labels": LABELS}, {"revision": boats}, {"allow_patterns": []}):
        with pytest.raises(ValueError, match=r"org/boats.* is not in the local cache, and the Hub did not give it"):
            get(**more, **settings)
    assert len(server.waits) == 0


@pytest.mark.parametrize("way", AWAY)
def test_an_encoder_that_stock_code_cached(way, server, model, boats, plain, get, tmp_path, caplog):
    for name in ("org/boats", "org/plain"):
        SentenceTransformer(name, cache_folder=str(tmp_path / "cache"), token="hf_test", device="cpu")
    settings = away(server, way)
    for name in ("org/boats", "org/plain"):  # a release or not: the cache does not tell
        with pytest.raises(ValueError, match=rf"xmc_config.json of {name} is not in the local cache"):
            get(name, **settings)
        assert len(get(name, labels=LABELS, **settings).labels) == len(LABELS)
        assert f"xmc_config.json of {name} is not in the local cache" in caplog.text
        assert "The encoder is loaded unchecked" in caplog.text
        caplog.clear()
    assert get(labels=LABELS, **settings).predict(TEXTS) == model.predict(TEXTS)
    assert get(allow_patterns=[], **settings).labels.num_rows == 0
    assert server.waits == []


@pytest.mark.parametrize("way", AWAY)
def test_a_part_that_is_not_cached_is_an_error_and_not_absent(way, server, model, boats, get, queries):
    encoder = get(allow_patterns=[])
    settings = away(server, way)
    assert get(allow_patterns=[], **settings).encoder.encode("boat").tolist() == encoder.encoder.encode("boat").tolist()
    for more in ({}, {"allow_patterns": "label_index/*"}, {"revision": boats}):
        with pytest.raises(ValueError, match=r"org/boats.* is not in the local cache"):
            get(**more, **settings)
    server.reach()
    assert get().predict(TEXTS) == model.predict(TEXTS)


READ = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer_config.json"]
READ += ["1_Pooling/config.json", "model.safetensors"]


@pytest.mark.parametrize("missing", READ)
def test_stock_code_would_take_files_that_are_not_cached_for_absent(missing, server, plain, get, tmp_path):
    get("org/plain", labels=LABELS)
    (removed,) = (tmp_path / "cache").glob(f"models--org--plain/snapshots/{plain}/{missing}")
    removed.unlink()
    server.reach(NOWHERE)
    with pytest.raises(ValueError, match=r"(?s)org/plain .*not in the local cache|org/plain has no xmc_config.json"):
        get("org/plain", labels=LABELS)
    server.reach()
    assert len(get("org/plain", labels=LABELS).labels) == len(LABELS)


ANSWERS = {
    "busy": "503",
    "error": "500",
    "gated": "org/boats is gated: ask for access on its page, and pass the `token`",
    "hidden": "'org/boats' is neither a folder here nor a model of the Hub",
    "denied": "Invalid credentials",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_hub_refuses_is_said_or_found_in_the_cache(answer, server, model, boats, get, tmp_path, caplog):
    server.faults.append(["GET", "api/models/org/boats", answer, 999])
    with pytest.raises(ValueError, match=ANSWERS[answer]):
        get()
    server.faults.clear()
    get()
    server.faults.append(["GET", "api/models/org/boats", answer, 999])
    assert get().predict(TEXTS) == model.predict(TEXTS)
    assert "org/boats: the Hub did not give it" in caplog.text
    assert server.waits == []


@pytest.mark.parametrize("fault", ["busy", "error", "cut"])
@pytest.mark.parametrize("name", ["xmc_config.json", "embeddings.safetensors", "model.safetensors"])
def test_a_download_that_fails_is_a_documented_error_and_can_be_repeated(fault, name, server, model, boats, get):
    server.faults.append(["GET", f"resolve/.*{name}", fault, 999])
    with pytest.raises(ValueError, match=r"org/boats could not be downloaded"):
        get()
    server.faults.clear()
    assert get().predict(TEXTS) == model.predict(TEXTS)


def test_a_damaged_file_in_the_cache_is_named_and_downloaded_again(server, model, boats, plain, get, tmp_path):
    found = {"org/boats": get(), "org/plain": get("org/plain", labels=LABELS)}
    settings = {"org/boats": {}, "org/plain": {"labels": LABELS}}
    for name, commit in {"org/boats": boats, "org/plain": plain}.items():
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
        for file in ("model.safetensors", *(["label_index/labels.parquet", "xmc_config.json"] * (name == "org/boats"))):
            path = (folder / file).resolve()
            path.write_bytes(path.read_bytes()[:-9])
            with pytest.raises(ValueError, match="force_download=True"):
                get(name, **settings[name])
            assert get(name, force_download=True, **settings[name]).predict(TEXTS) == found[name].predict(TEXTS)
            assert get(name, **settings[name]).predict(TEXTS) == found[name].predict(TEXTS)
        (folder / "model.safetensors").resolve().unlink()  # a link that leads nowhere
        assert get(name, **settings[name]).predict(TEXTS) == found[name].predict(TEXTS)


def test_a_download_that_cannot_be_forced_is_refused(server, boats, get):
    get()
    with pytest.raises(ValueError, match="leave one of them out"):
        get(force_download=True, local_files_only=True)
    server.reach(NOWHERE)
    with pytest.raises(ValueError, match="org/boats cannot be downloaded again: the Hub did not give it"):
        get(force_download=True)


def test_a_cache_that_cannot_be_written(server, model, boats, get, tmp_path, monkeypatch):
    get()
    shutil.rmtree(tmp_path / "cache" / "models--org--boats" / "trees")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("huggingface_hub._tree_cache.tempfile.mkstemp", refuse)
    monkeypatch.setattr("huggingface_hub._snapshot_download._cache_commit_hash_for_specific_revision", refuse)
    assert get().predict(TEXTS) == model.predict(TEXTS)
    server.reach(NOWHERE)
    assert get().predict(TEXTS) == model.predict(TEXTS)
    server.reach()
    monkeypatch.setattr("huggingface_hub.file_download.os.makedirs", refuse)
    with pytest.raises(ValueError, match=r"org/boats could not be downloaded .*Permission denied"):
        get(cache_dir=tmp_path / "elsewhere")


def test_a_cache_of_sentence_transformers_is_the_default(server, model, boats, get, tmp_path, monkeypatch):
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "home"))
    assert get(cache_dir=None).predict(TEXTS) == model.predict(TEXTS)
    assert (tmp_path / "home" / "models--org--boats").is_dir()


def test_a_folder_needs_no_hub(server, model, boats, tmp_path):
    server.reach(NOWHERE)
    assert repository.find(tmp_path / "boats") == tmp_path / "boats"
    assert XMCModel.from_pretrained(tmp_path / "boats", force_download=True).predict(TEXTS) == model.predict(TEXTS)
    assert isinstance(repository.source("org/boats"), Snapshot)
