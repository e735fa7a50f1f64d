"""With the Hub out of reach, cached files are used at once, and uncached files are an error."""

import shutil

import datasets
import pyarrow.parquet as pq
import pytest
from helpers import dataset_layouts
from helpers.hub_server import Hub, point_client_at
from helpers.tiny import LABELS, make_bert_encoder, make_static_encoder
from huggingface_hub import _tree_cache
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCModel, load_xmc
from hf_xmc.hub import repository
from hf_xmc.storage.snapshots import Snapshot

TEXTS = ["a red boat", "old oak tree"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def server(monkeypatch):
    """Point the real client of this process at a server; no request may wait for a missing answer."""
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


def put_folder(server, name, folder, kind="model"):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return server.put(name, files, kind)


@pytest.fixture
def boats(server, model, tmp_path):
    """Publish a release and return its commit."""
    model.save_pretrained(tmp_path / "boats")
    return put_folder(server, "org/boats", tmp_path / "boats")


@pytest.fixture
def plain(server, tmp_path, bert_folder):
    """Publish a plain encoder of sentence-transformers and return its commit."""
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
def test_cached_model_loads_without_waiting_for_the_hub(way, server, model, boats, plain, get, caplog):
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
    assert ("org/plain: the Hub did not return it" in caplog.text) == (way == "down")


def test_cached_commit_needs_no_request(server, model, boats, get):
    get(revision=boats)
    server.reach()
    assert get(revision=boats).predict(TEXTS) == model.predict(TEXTS)
    assert server.requests == []


@pytest.mark.parametrize("way", AWAY)
def test_uncached_model_is_an_error(way, server, boats, get, tmp_path):
    settings = away(server, way)
    for more in ({}, {"labels": LABELS}, {"revision": boats}, {"parts": ()}):
        with pytest.raises(ValueError, match=r"org/boats.* is not in the local cache, and the Hub did not return it"):
            get(**more, **settings)
    assert len(server.waits) == 0


@pytest.mark.parametrize("way", AWAY)
def test_encoder_cached_by_stock_code_loads_with_given_labels(way, server, model, boats, plain, get, tmp_path, caplog):
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
    assert get(parts=(), **settings).labels.num_rows == 0
    assert server.waits == []


@pytest.mark.parametrize("way", AWAY)
def test_uncached_part_is_an_error_and_not_absent(way, server, model, boats, get, queries):
    encoder = get(parts=())
    settings = away(server, way)
    assert get(parts=(), **settings).encoder.encode("boat").tolist() == encoder.encoder.encode("boat").tolist()
    for more in ({}, {"parts": ("label_index",)}, {"revision": boats}):
        with pytest.raises(ValueError, match=r"org/boats.* is not in the local cache"):
            get(**more, **settings)
    server.reach()
    assert get().predict(TEXTS) == model.predict(TEXTS)


READ = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer_config.json"]
READ += ["1_Pooling/config.json", "model.safetensors"]


@pytest.mark.parametrize("missing", READ)
def test_uncached_file_of_an_encoder_is_an_error(missing, server, plain, get, tmp_path):
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
    "gated": "org/boats is gated. Request access on its page, and pass the `token`",
    "hidden": "'org/boats' is neither a folder here nor a model of the Hub",
    "denied": "Invalid credentials",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_refusal_of_the_hub_is_reported_or_the_cache_is_used(answer, server, model, boats, get, tmp_path, caplog):
    server.faults.append(["GET", "api/models/org/boats", answer, 999])
    with pytest.raises(ValueError, match=ANSWERS[answer]):
        get()
    server.faults.clear()
    get()
    server.faults.append(["GET", "api/models/org/boats", answer, 999])
    assert get().predict(TEXTS) == model.predict(TEXTS)
    assert "org/boats: the Hub did not return it" in caplog.text
    assert server.waits == []


@pytest.mark.parametrize("fault", ["busy", "error", "cut"])
@pytest.mark.parametrize("name", ["xmc_config.json", "embeddings.safetensors", "model.safetensors"])
def test_failed_download_is_an_error_and_can_be_repeated(fault, name, server, model, boats, get):
    server.faults.append(["GET", f"resolve/.*{name}", fault, 999])
    with pytest.raises(ValueError, match=r"org/boats could not be downloaded"):
        get()
    server.faults.clear()
    assert get().predict(TEXTS) == model.predict(TEXTS)


def test_damaged_cached_file_is_named_and_can_be_downloaded_again(server, model, boats, plain, get, tmp_path):
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


def test_impossible_forced_download_is_refused(server, boats, get):
    get()
    with pytest.raises(ValueError, match="Leave one of them out"):
        get(force_download=True, local_files_only=True)
    server.reach(NOWHERE)
    with pytest.raises(ValueError, match="org/boats cannot be downloaded again: the Hub did not return it"):
        get(force_download=True)


def test_read_only_cache_is_read_and_reported_on_download(server, model, boats, get, tmp_path, monkeypatch):
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


def test_cache_of_sentence_transformers_is_the_default(server, model, boats, get, tmp_path, monkeypatch):
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "home"))
    assert get(cache_dir=None).predict(TEXTS) == model.predict(TEXTS)
    assert (tmp_path / "home" / "models--org--boats").is_dir()
    assert Snapshot("org/data", repo_type="dataset").cache_dir is None


def test_folder_loads_without_the_hub(server, model, boats, tmp_path):
    server.reach(NOWHERE)
    found = repository.find(tmp_path / "boats")
    assert (found.folder, found.parts) == (tmp_path / "boats", ("label_index",))
    assert XMCModel.from_pretrained(tmp_path / "boats", force_download=True).predict(TEXTS) == model.predict(TEXTS)
    assert isinstance(repository.source("org/boats"), Snapshot)


@pytest.fixture
def data(server, tmp_path):
    """Publish a data set with files that no table needs, and return its commit."""
    dataset_layouts.write_hub(tmp_path / "data")
    big = "- config_name: embeddings\n  data_files: big/*.parquet\n- config_name: labels"
    card = tmp_path / "data" / "README.md"
    card.write_text(card.read_text().replace("- config_name: labels", big))
    put_folder(server, "org/data", tmp_path / "data", kind="dataset")
    return server.put("org/data", {"big/1.parquet": b"big", "data/other.csv": b"a\n1\n"}, kind="dataset")


@pytest.fixture
def load(tmp_path):
    def load(name="org/data", **settings):
        return held(load_xmc(name, **{"cache_dir": tmp_path / ".cache" / "hub", "token": "hf_test", **settings}))

    return load


def held(data):
    rows = [[(row["text"], row["label_ids"]) for row in split] for split in (data.train, data.test)]
    return [*rows, data.labels["text"][:], {name: pairs.tolist() for name, pairs in data.filter_pairs.items()}]


DATA = [dataset_layouts.TRAIN, dataset_layouts.TEST, dataset_layouts.LABELS, {"test": dataset_layouts.FILTER_PAIRS}]


def cached(tmp_path, commit, name="org/data"):
    return tmp_path / ".cache" / "hub" / f"datasets--{name.replace('/', '--')}" / "snapshots" / commit


def forget_list(folder):
    """Leave the cache as older clients and ``datasets`` fill it, which keep no list of a repository's files."""
    shutil.rmtree(folder.parents[1] / "trees")
    absent = folder.parents[1] / ".no_exist" / folder.name
    absent.mkdir(parents=True)
    (absent / ".huggingface.yaml").touch()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


@pytest.mark.parametrize("way", AWAY)
def test_cached_data_load_without_waiting_for_the_hub(way, server, data, load, caplog):
    server.repositories["dataset", "org/data"].refs |= {"v1": data}
    revisions = [None, "main", "v1", data]
    for revision in revisions:
        assert load(revision=revision) == DATA
    assert not [request for request in server.requests if "big" in request or "other.csv" in request]
    caplog.clear()
    settings = away(server, way)
    for revision in revisions:
        assert load(revision=revision, **settings) == DATA
    assert (server.requests, server.waits) == ([], [])
    assert ("org/data: the Hub did not return it" in caplog.text) == (way == "down")


def test_cached_commit_of_data_needs_no_request(server, data, load):
    load()
    server.put("org/data", {"README.md": b"# nothing"}, kind="dataset")
    server.reach()
    assert load(revision=data) == DATA
    assert server.requests == []
    with pytest.raises(ValueError, match=r"org/data.* must have the configs `default` .*, got \[\]"):
        load()


@pytest.mark.parametrize("way", AWAY)
def test_uncached_data_are_an_error(way, server, data, load):
    settings = away(server, way)
    for revision in (None, "main", data):
        with pytest.raises(ValueError, match=r"org/data.* is not in the local cache, and the Hub did not return it"):
            load(revision=revision, **settings)
    with pytest.raises(ValueError, match="'runs/typo' is neither a folder here nor a data set of the Hub in reach"):
        load("runs/typo", **settings)
    assert server.waits == []


def test_offline_setting_of_datasets_is_respected(server, data, load, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="org/data is not in the local cache"):
        load()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert load() == DATA
    server.reach()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert (load(), server.requests) == (DATA, [])


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("missing", ["README.md", "data/test.parquet", "data/filter_pairs.parquet"])
def test_uncached_table_is_an_error_and_not_absent(missing, listed, server, data, load, tmp_path):
    load()
    (cached(tmp_path, data) / missing).unlink()
    if not listed:
        forget_list(cached(tmp_path, data))
    server.reach(NOWHERE)
    for revision in (None, data):
        with pytest.raises(ValueError, match=r"org/data.* is not in the local cache"):
            load(revision=revision)
    server.reach()
    assert load() == DATA


def test_cached_shards_of_unknown_number_are_an_error(server, load, tmp_path):
    dataset_layouts.write_hub(tmp_path / "data")
    rows = pq.read_table(tmp_path / "data" / "data" / "train.parquet")
    (tmp_path / "data" / "data" / "train.parquet").unlink()
    for number, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(part, tmp_path / "data" / "data" / f"train-{number}.parquet")
    card = (tmp_path / "data" / "README.md").read_text().replace("data/train.parquet", '"data/**/train-*.parquet"')
    (tmp_path / "data" / "README.md").write_text(card)
    commit = put_folder(server, "org/data", tmp_path / "data", kind="dataset")
    assert load() == DATA
    server.reach(NOWHERE)
    assert load() == DATA
    (cached(tmp_path, commit) / "data" / "train-1.parquet").unlink()
    with pytest.raises(ValueError, match="org/data is not in the local cache"):
        load()
    forget_list(cached(tmp_path, commit))
    with pytest.raises(ValueError, match=r"data/\*train-\*\.parquet of org/data is not in the local cache"):
        load()


@pytest.mark.parametrize("answer", ANSWERS)
def test_refusal_of_data_is_reported_or_the_cache_is_used(answer, server, data, load, caplog):
    expected = ANSWERS[answer].replace("org/boats", "org/data").replace("a model", "a data set")
    server.faults.append(["GET", "api/datasets/org/data", answer, 999])
    with pytest.raises(ValueError, match=expected):
        load()
    server.faults.clear()
    load()
    server.faults.append(["GET", "api/datasets/org/data", answer, 999])
    assert load() == DATA
    assert "org/data: the Hub did not return it" in caplog.text
    assert server.waits == []


@pytest.mark.parametrize("fault", ["busy", "error", "cut"])
@pytest.mark.parametrize("name", ["README.md", "labels.parquet", "train.parquet"])
def test_failed_download_of_data_can_be_repeated(fault, name, server, data, load):
    server.faults.append(["GET", f"resolve/.*{name}", fault, 999])
    with pytest.raises(ValueError, match="org/data could not be downloaded"):
        load()
    server.faults.clear()
    assert load() == DATA


def test_missing_revision_of_data_is_an_error(server, data, load):
    for revision in ("nope", "1" * 40):
        with pytest.raises(ValueError, match=f"org/data has no revision '{revision}'; expected a branch, a tag"):
            load(revision=revision)


def test_data_are_downloaded_again_with_force_download(server, data, load, tmp_path):
    load()
    path = (cached(tmp_path, data) / "data" / "labels.parquet").resolve()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"labels\.parquet: not a readable table"):
        load()
    assert load(force_download=True) == DATA
    assert load() == DATA
    with pytest.raises(ValueError, match="Leave one of them out"):
        load(force_download=True, local_files_only=True)
    server.reach(NOWHERE)
    with pytest.raises(ValueError, match="org/data cannot be downloaded again: the Hub did not return it"):
        load(force_download=True)


def test_config_given_by_its_folder_is_read(server, load, tmp_path):
    dataset_layouts.write_hub(tmp_path / "data")
    (tmp_path / "data" / "words").mkdir()
    (tmp_path / "data" / "data" / "labels.parquet").rename(tmp_path / "data" / "words" / "train.parquet")
    card = (tmp_path / "data" / "README.md").read_text()
    (tmp_path / "data" / "README.md").write_text(card.replace("data_files: data/labels.parquet", "data_dir: words"))
    put_folder(server, "org/data", tmp_path / "data", kind="dataset")
    assert load() == DATA
    server.reach(NOWHERE)
    assert load() == DATA


@pytest.mark.parametrize("configs", ["[3]", "3", "[{data_files: a.csv}]", "[{config_name: a, data_files: [3]}]"])
def test_unreadable_configs_of_a_card_are_an_error(configs, server, load, tmp_path):
    card = f"---\nconfigs: {configs}\n---\n"
    server.put("org/data", {"README.md": card.encode()}, kind="dataset")
    with pytest.raises(ValueError, match=r"org/data: the configs in its README\.md cannot be read"):
        load()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "README.md").write_text(card)
    with pytest.raises(ValueError, match=r"here: the configs in its README\.md cannot be read"):
        load(tmp_path / "here")


def test_invalid_utf8_in_a_repository_is_replaced_on_request(tmp_path):
    configs = "".join(
        f"- {{config_name: {c}, data_files: {f}}}\n" for c, f in (("default", "q.jsonl"), ("labels", "l.jsonl"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (tmp_path / "q.jsonl").write_bytes(b'{"text": "caf\xe9", "label_ids": [0]}\n')
    (tmp_path / "l.jsonl").write_text('{"text": "coffee"}\n')
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_xmc(tmp_path)
    data = load_xmc(tmp_path, errors="replace")
    assert data.train["text"][:] == ["caf\ufffd"]


def test_revision_of_a_folder_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    dataset_layouts.write_jsonl(tmp_path / "data")
    for load, folder in ((XMCModel.from_pretrained, tmp_path / "model"), (load_xmc, tmp_path / "data")):
        with pytest.raises(ValueError, match=r"`?revision`? must be None for (a folder|the local folder .*), got 'v1'"):
            load(folder, revision="v1")


def test_unreachable_file_of_another_host_is_an_error(server, data, load):
    card = server.files("org/data", "dataset")["README.md"].replace(
        b"data/labels.parquet", NOWHERE.encode() + b"/l.parquet"
    )
    server.put("org/data", {"README.md": card}, kind="dataset")
    with pytest.raises(ValueError, match="org/data, labels: "):
        load()


def test_data_cached_by_stock_code_load_completely(server, data, load, tmp_path, monkeypatch):
    hub = str(tmp_path / ".cache" / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", server.url)
    for config in ("default", "filter_pairs", "labels"):
        server.reach()
        datasets.load_dataset("org/data", config, token="hf_test")
        server.reach(NOWHERE)
        if config == "labels":
            assert load() == DATA
        else:
            with pytest.raises(ValueError, match=r"data/.*\.parquet of org/data is not in the local cache"):
                load()
