"""The recipes for serving, each started the way its host starts it."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import requests
import yaml
from gradio_client import Client
from helpers.environments import Started, free_port, make_environment
from helpers.hub_server import Hub, point_client_at
from helpers.server import make_model
from helpers.tiny import RECIPES, ROOT
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_xmc import XMCModel

SERVING = RECIPES / "serving"
TEXTS = ["a red boat", "an old oak tree"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model that its users may read and nobody may change."""
    folder = tmp_path_factory.mktemp("serving") / "model"
    model.save_pretrained(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that the recipes install."""
    copy, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "hf_xmc", copy / "hf_xmc", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(made), str(copy)]
    subprocess.run(command, check=True, timeout=200)
    (wheel,) = made.glob("hf_xmc-*.whl")
    return wheel


@pytest.fixture(scope="module")
def container(wheel, tmp_path_factory):
    """What the image installs: the wheel, with all that serving and Milvus need."""
    environment = make_environment(tmp_path_factory.mktemp("container"), REQUIREMENTS)
    python = environment / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    subprocess.run(command, check=True, timeout=200)
    return environment


def expected(model, text, top_k):
    return [label._asdict() for label in model.predict(text, top_k)]


def ask(url, text="a red boat", top_k=2):
    answer = requests.post(f"{url}/predict", json={"texts": text, "top_k": top_k}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"][0]


# The Space


@pytest.mark.timeout(600)
def test_a_pushed_space_shows_the_page_with_its_requirements_alone(model, tmp_path, monkeypatch):
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    model.push_to_hub("org/boats", token="hf_test")
    model.push_to_space("org/boats-page", model_id="org/boats", token="hf_test")
    space = tmp_path / "app"
    for name, content in hub.files("org/boats-page", "space").items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(content)
    about = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    installed = [line for line in (space / "requirements.txt").read_text().splitlines() if line[0] != "-"]
    environment = make_environment(tmp_path / "environment", [*installed, f"gradio=={about['sdk_version']}"])
    assert not list(environment.glob("lib/*/site-packages/*hf_xmc*")), "the Space has its own copy"

    port = free_port()
    variables = {"SPACE_ID": "org/boats-page", "SYSTEM": "spaces", "GRADIO_SERVER_NAME": "127.0.0.1"}
    variables |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_SSR_MODE": "True"}
    variables |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_test",
        "HOME": str(tmp_path),
    }
    command = [environment / "bin" / "python", about["app_file"]]
    with Started(command, port, cwd=space, environment=variables) as started:
        assert "hf_xmc: boats-page" in requests.get(started.url, timeout=60).text
        page = Client(started.url, verbose=False, analytics_enabled=False, download_files=tmp_path)
        table = page.predict("a red boat", 2, None, None, api_name="/predict")[1]
        assert table["data"] == [list(label) for label in model.predict("a red boat", 2)]
        assert ask(started.url) == expected(model, "a red boat", 2)
    hub.shutdown()


# The handler of an endpoint


@pytest.fixture
def repository(model, tmp_path):
    """A model repository with the files of an endpoint."""
    model.save_pretrained(tmp_path / "repository")
    shutil.copy(SERVING / "handler.py", tmp_path / "repository")
    shutil.copy(SERVING / "endpoint.txt", tmp_path / "repository" / "requirements.txt")
    (tmp_path / "repository" / "hf_xmc-0.1.0-py3-none-any.whl").write_bytes(b"")
    return tmp_path / "repository"


def load_handler(repository):
    """Load a handler as huggingface-inference-toolkit does."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", repository / "handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(repository))


@pytest.fixture
def handler(repository):
    yield load_handler(repository)
    del sys.modules["handler.EndpointHandler"]


def test_the_handler_answers_as_the_pipeline_does(handler, model, bert_folder):
    config = AutoConfig.from_pretrained(bert_folder, num_labels=3)
    stock = pipeline(
        "text-classification",
        model=AutoModelForSequenceClassification.from_config(config),
        tokenizer=AutoTokenizer.from_pretrained(bert_folder),
        device="cpu",
    )
    for inputs in (TEXTS[0], TEXTS, TEXTS[:1]):
        ours = json.loads(json.dumps(handler({"inputs": inputs, "parameters": {"top_k": 2}})))
        theirs = stock(inputs, top_k=2)
        assert shape(ours) == shape(theirs)
    first = model.predict(TEXTS[0], top_k=1)[0]
    assert handler({"inputs": TEXTS[0]})[0] == {"label": first.text, "score": first.score, "uid": first.uid}


def shape(answer):
    """The lists of an answer, and the fields of both kinds of labels."""
    if isinstance(answer, list):
        return [shape(part) for part in answer]
    return {name: type(answer[name]) for name in ("label", "score")}


def test_the_handler_takes_the_parameters_of_predict(handler, model):
    uids = [label.uid for label in model.predict(TEXTS[0])]
    for parameters in ({"allow": uids[1:2]}, {"deny": uids[:1], "top_k": 1}, {"threshold": 0.5}, {}, None):
        answer = handler({"inputs": TEXTS[0], "parameters": parameters})
        assert [label["uid"] for label in answer] == [p.uid for p in model.predict(TEXTS[0], **(parameters or {}))]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({}, "`inputs` must be a text or a list of texts, got NoneType"),
        ({"inputs": {"text": "a", "text_pair": "b"}}, "`inputs` must be a text or a list of texts, got dict"),
        ({"inputs": [1]}, "`inputs` must be a text or a list of texts, got list"),
        (
            {"inputs": "a", "parameters": {"function_to_apply": "none"}},
            "`parameters` must be a dictionary with top_k, ",
        ),
        ({"inputs": "a", "parameters": [1]}, "`parameters` must be a dictionary"),
        ({"inputs": "a", "parameters": {"allow": ["nothing"]}}, "uid 'nothing' is not one of the 11 labels"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "top_k must be at least 1, got 0"),
    ],
)
def test_the_handler_refuses_other_requests(handler, data, error):
    with pytest.raises(ValueError, match=error):
        handler(data)


def test_a_new_push_keeps_the_files_of_an_endpoint(repository, model, monkeypatch):
    hub = Hub()
    point_client_at(hub.url, monkeypatch)
    endpoint = {name: (repository / name).read_bytes() for name in ("handler.py", "requirements.txt")}
    hub.put("org/boats", {**endpoint, "hf_xmc-0.1.0-py3-none-any.whl": b"", "old.safetensors": b""})
    model.push_to_hub("org/boats", token="hf_test")
    assert hub.files("org/boats").keys() >= {*endpoint, "hf_xmc-0.1.0-py3-none-any.whl", "xmc_config.json"}
    assert "old.safetensors" not in hub.files("org/boats")
    hub.shutdown()


# The container


REQUIREMENTS = [
    "accelerate", "datasets", "evaluate", "faiss-cpu", "huggingface-hub", "jinja2", "numpy", "pyarrow", "pyyaml",
    "safetensors", "scikit-learn", "scipy", "sentence-transformers", "tokenizers", "torch", "tqdm", "transformers",
    "fastapi", "gradio", "prometheus-client", "pydantic", "python-multipart", "starlette", "uvicorn", "pymilvus",
    "milvus-lite",
]  # fmt: skip


def instructions():
    """The instructions of the Dockerfile and their values, those of its last stage alone."""
    text = re.sub(r"\\\n\s*", "", (SERVING / "Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and line[0] != "#"]
    last = max(number for number, line in enumerate(lines) if line[0] == "FROM")
    return [(word, value.strip()) for word, _, value in lines[last:]]


def variables_of(dockerfile):
    return dict(part.split("=", 1) for word, value in dockerfile if word == "ENV" for part in shlex.split(value))


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_image_serves_offline_as_a_user_who_can_write_nothing_but_tmp(container, folder, model, tmp_path):
    dockerfile = instructions()
    (user,) = [value for word, value in dockerfile if word == "USER"]
    assert user == "10001"
    variables = variables_of(dockerfile)
    assert variables["HF_HUB_OFFLINE"] == "1"
    (entry,) = [json.loads(value) for word, value in dockerfile if word == "ENTRYPOINT"]
    (command,) = [json.loads(value) for word, value in dockerfile if word == "CMD"]
    (check,) = [json.loads(value.partition("CMD ")[2]) for word, value in dockerfile if word == "HEALTHCHECK"]
    port, scratch = free_port(), tmp_path / "tmp"
    scratch.mkdir()
    scratch.chmod(0o777)
    replaced = {"/model": str(folder), "8000": str(port), "0.0.0.0": "127.0.0.1"}
    command = [str(container / "bin" / entry[0]), *entry[1:], *[replaced.get(word, word) for word in command]]
    variables |= {"PATH": f"{container}/bin", "HOME": str(scratch), "TMPDIR": str(scratch)}
    before = snapshot(folder)
    with Started(command, port, cwd=folder, environment=variables, as_nobody=True) as started:
        assert ask(started.url) == expected(model, "a red boat", 2)
        assert "hf_xmc: model" in requests.get(started.url, timeout=60).text
        healthy = [str(container / "bin" / check[0]), *[word.replace("8000", str(port)) for word in check[1:]]]
        assert subprocess.run(healthy, check=False, timeout=60).returncode == 0
    assert subprocess.run(healthy, check=False, timeout=60, stderr=subprocess.DEVNULL).returncode != 0
    assert snapshot(folder) == before


def test_the_context_of_the_image_holds_what_it_copies_and_nothing_else():
    first, *others = (SERVING / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?([^-]\S*) ", (SERVING / "Dockerfile").read_text(), re.M)
    assert first == "*"
    assert sorted(others) == sorted(f"!{name}" for name in copied)
    assert all(list(SERVING.glob(name)) for name in copied if not name.endswith(".whl"))


# Milvus


def composed(**variables):
    """The compose file, with its variables replaced as `docker compose` does."""

    def value(found):
        name, _, default = found[1].partition(":")
        return variables.get(name) or default.removeprefix("-")

    return yaml.safe_load(re.sub(r"\$\{([^}]*)\}", value, (SERVING / "compose.yaml").read_text()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_of_the_compose_file_searches_in_milvus(container, folder, model, tmp_path):
    compose = composed(MODEL=str(folder), MILVUS=str(tmp_path / "labels.db"))
    server = compose["services"]["server"]
    assert server["depends_on"] == {"milvus": {"condition": "service_healthy"}}
    assert server["volumes"] == [{"type": "bind", "source": str(folder), "target": "/model", "read_only": True}]
    assert server["build"]["args"]["EXTRAS"].split(",") == ["serve", "milvus"]
    assert composed(MODEL="x")["services"]["server"]["command"][2] == "http://milvus:19530"
    port = free_port()
    replaced = {"/model": str(folder), "8000": str(port), "0.0.0.0": "127.0.0.1"}
    replaced |= {
        "python": str(container / "bin" / "python"),
        "/app/milvus_server.py": str(SERVING / "milvus_server.py"),
    }
    command = [replaced.get(word, word) for word in [*server["entrypoint"], *server["command"]]]
    variables = {**variables_of(instructions()), "PATH": f"{container}/bin:{os.defpath}", "HOME": str(tmp_path)}
    logs = []
    for _ in range(2):  # the second one finds the collection of the first
        with Started(command, port, cwd=tmp_path, environment=variables) as started:
            assert ask(started.url, top_k=3) == expected(model, "a red boat", 3)
        logs.append("".join(started.log))
    (name,) = {re.search(r"collection (model_\w+) of", log)[1] for log in logs}
    assert len(name) == len("model_") + 16


def test_a_milvus_server_finds_labels_of_the_model_in_milvus(folder, tmp_path):
    from hf_xmc import MilvusIndex

    model = XMCModel.from_pretrained(folder)
    before = model.predict("a red boat")
    model.index = MilvusIndex(model.index.embeddings, str(tmp_path / "labels.db"), keep=True)
    assert model.calibration is not None
    assert model.predict("a red boat") == before
    model.index.close()
