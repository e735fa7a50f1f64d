"""Spaces with the page of a model: pushed with the real client, and what is refused before anything changes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.hub_server import Hub, point_client_at
from helpers.tiny import LABELS, make_static_encoder

import hf_xmc
from hf_xmc import XMCModel
from hf_xmc.cli import main
from hf_xmc.hub.space import write

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "serving" / "space"


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    point_client_at(server.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def model():
    return XMCModel(make_static_encoder(), LABELS)


def front_matter(readme):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", readme.decode(), re.S)[1])


def changes(hub):
    """The requests that change something."""
    return [line for line in hub.requests if line.startswith(("PUT", "DELETE")) or re.search("create|commit", line)]


def test_a_space_has_the_page_the_package_and_the_model(hub, model, tmp_path):
    address = model.push_to_space("org/boats-page", private=True)
    assert "/commit/" in address
    files = hub.files("org/boats-page", "space")
    about = front_matter(files["README.md"])
    assert (about["sdk"], about["app_file"], about["models"]) == ("gradio", "app.py", [])
    assert re.fullmatch(r"6\.\d+\.\d+", about["sdk_version"])
    assert {"app.py", "requirements.txt", "hf_xmc/cli/__main__.py", "hf_xmc/py.typed", ".gitattributes"} <= set(files)
    assert not [name for name in files if "__pycache__" in name]
    assert "torch<3,>=2.6" in files["requirements.txt"].decode().splitlines()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert XMCModel.from_pretrained(tmp_path / "model").predict("a red boat") == model.predict("a red boat")


def test_a_space_may_show_a_model_of_the_hub(hub, model):
    model.push_to_hub("org/boats")
    model.push_to_space("org/boats-page", model_id="org/boats", requirement="hf_xmc[serve]==0.1.0")
    files = hub.files("org/boats-page", "space")
    assert set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    assert files["requirements.txt"].decode().splitlines()[1:] == ["hf_xmc[serve]==0.1.0"]
    assert '"org/boats")' in files["app.py"].decode()
    assert front_matter(files["README.md"])["models"] == ["org/boats"]


def test_a_new_push_replaces_the_old_one_and_keeps_the_edited_card(hub, model):
    model.push_to_space("org/page")
    card = hub.files("org/page", "space")["README.md"].replace(b"# page", b"# Boats of the world")
    hub.put("org/page", {"README.md": card, "model/old.safetensors": b"old", "notes.txt": b"mine"}, "space")
    model.push_to_hub("org/boats")
    model.push_to_space("org/page", model_id="org/boats")
    files = hub.files("org/page", "space")
    assert not [name for name in files if name.startswith("model/")]
    assert files["notes.txt"] == b"mine"
    assert b"# Boats of the world" in files["README.md"]
    assert front_matter(files["README.md"])["models"] == ["org/boats"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"repo_id": "boats"}, "`repo_id` must be the name of a repository, 'org/name', got 'boats'"),
        ({"model_id": "boats"}, "`model_id` must be the name of a repository, 'org/name', got 'boats'"),
        (
            {"repo_id": "org/theirs"},
            r"the Space org/theirs has other content \(app.py, data.csv\): choose",
        ),
        ({"token": False}, "a push to org/page needs a token, and none was found. Log in with `hf auth login`"),
        ({"model_id": "org/nothing"}, "`model_id` must be a model on the Hub .* got 'org/nothing'. Push the model"),
        ({"model_id": "org/plain"}, "`model_id` must be a model on the Hub .* got 'org/plain'"),
        ({"model_id": "org/others"}, "org/others holds another model: label_index/embeddings.safetensors differ. Push"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_hub_changes(hub, model, arguments, error):
    hub.put("org/theirs", {"app.py": b"theirs", "data.csv": b"", "README.md": b"theirs"}, "space")
    hub.put("org/plain", {"modules.json": b"[]"})
    others = XMCModel(model.encoder, LABELS[:-1])
    others.push_to_hub("org/others")
    hub.requests.clear()
    with pytest.raises(ValueError, match=error):
        model.push_to_space(**{"repo_id": "org/page", **arguments})
    assert not changes(hub)


def test_no_token_a_refused_token_and_no_label_change_nothing(hub, model, monkeypatch):
    with pytest.raises(ValueError, match="the model has no label to show"):
        XMCModel(model.encoder).push_to_space("org/page")
    hub.faults.append(["GET", "whoami", "denied", 1])
    with pytest.raises(RuntimeError, match=r"(?s)the push to org/page has not begun: .*Nothing was changed"):
        model.push_to_space("org/page")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nothing")
    with pytest.raises(ValueError, match="a push to org/page needs a token"):
        model.push_to_space("org/page")
    assert not changes(hub)


def test_a_failed_push_keeps_the_old_space_and_can_be_repeated(hub, model):
    for labels in (LABELS[:-1], LABELS):  # the first Space is new
        hub.faults[:] = [["POST", "commit/main", "error", 99]]
        with pytest.raises(RuntimeError, match=r"(?s)the push to org/page failed .* Push again"):
            XMCModel(model.encoder, labels).push_to_space("org/page")
        before = hub.files("org/page", "space")
        hub.faults.clear()
        XMCModel(model.encoder, labels).push_to_space("org/page")
        assert hub.files("org/page", "space")["model/xmc_config.json"] != before.get("model/xmc_config.json")


def test_the_command_pushes_a_space(hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    assert main(["push", str(tmp_path), "org/page", "--space", "--requirement", "hf_xmc[serve]==0.1.0"]) == 0
    assert json.loads(capsys.readouterr().out)["repo_id"] == "org/page"
    assert "app.py" in hub.files("org/page", "space")
    for options, error in [
        (["--model_id", "org/boats"], "--model_id has no effect without --space"),
        (["--space", "--create_pr"], "--create_pr has no effect with --space"),
    ]:
        assert main(["push", str(tmp_path), "org/page", *options]) == 1
        assert error in capsys.readouterr().err
    hub.faults.append(["POST", "commit/main", "error", 99])
    assert main(["push", str(tmp_path), "org/page", "--space"]) == 1
    assert "hf-xmc push: the push to org/page failed" in capsys.readouterr().err


def test_the_recipe_is_what_is_pushed(tmp_path):
    write(tmp_path, "org/boats-page", model_id="org/boats")
    versions = re.compile("^(sdk|python)_version: .*\n|^gradio.*\n", re.M)
    for name in ("app.py", "README.md", "requirements.txt"):
        ours, pushed = (versions.sub("", (folder / name).read_text()) for folder in (RECIPE, tmp_path))
        assert ours == pushed, name
    assert (tmp_path / "hf_xmc" / "__init__.py").read_text() == Path(hf_xmc.__file__).read_text()
