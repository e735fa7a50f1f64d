"""A Space of the Hub with the page of a model, which it runs as ``python app.py``."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import yaml
from jinja2 import Environment, StrictUndefined

import hf_xmc
from hf_xmc.hub import manifest
from hf_xmc.hub.manifest import LAYOUT, REBUILT
from hf_xmc.hub.repository import REPO_ID
from hf_xmc.storage.commits import Repository, check_token, commit_to, find_repository

TEMPLATES = Path(__file__).with_name("space_template")
TAG = "hf-xmc"  # of the card of a Space that was made here
EMPTY = {LAYOUT.card, ".gitattributes"}  # the files of a new Space
MODEL, SOURCE = "model", "hf_xmc"  # folders in a Space
CPU_TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"  # gigabytes less than the default of Linux


class SpaceSettings(TypedDict, total=False):
    """The settings of a push, see :func:`push`."""

    model_id: str | None
    requirement: str | None
    private: bool | None
    commit_message: str
    token: str | bool | None


def push(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    model_id: str | None = None,
    requirement: str | None = None,
    private: bool | None = None,
    commit_message: str = "Page of a model",
    token: str | bool | None = None,
) -> str:
    """Publish the page of a model as a Space, in one commit. Everything is checked before the Hub is changed.

    Args:
        save: Function that saves the model to a new folder.
        repo_id: Name of the Space, ``org/name``, which is created if it does not exist.
        model_id: Name of a repository that holds the model. The Space loads it from there. By default the Space has a
            copy of the model.
        requirement: How the Space installs this package: a line of ``requirements.txt``, such as
            ``"hf_xmc[serve] @ git+https://..."``. By default the Space has a copy of the installed package, and
            installs its dependencies.
        private: Whether a new Space is private; by default as the organization is set up.
        commit_message: First line of the commit message.
        token: Token of an account; by default the one that is logged in.

    Returns the address of the commit.

    Raises:
        ValueError: if a name is not ``org/name``, there is no token, the Space has other content, or ``model_id`` is
            not a model on the Hub or is another one.
        ModuleNotFoundError: if Gradio, whose version the Space will use, is not installed.
        RuntimeError: if the push fails. The Space then has its old content, or all of the new one.
    """
    for name, given in (("repo_id", repo_id), ("model_id", model_id)):
        if given is not None and not REPO_ID.fullmatch(given):
            raise ValueError(f"`{name}` must be the name of a repository, 'org/name', got {given!r}.")
    check_token(repo_id, token)
    _check_replaceable(find_repository(repo_id, "space", token), repo_id)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder / MODEL)
        (folder / MODEL / LAYOUT.card).unlink()  # it describes a model repository
        if model_id is not None:
            _check_same(folder / MODEL, find_repository(model_id, "model", token), model_id)
            shutil.rmtree(folder / MODEL)
        write(folder, repo_id, model_id=model_id, requirement=requirement)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        with commit_to(repo_id, "space", private=private, token=token, space_sdk="gradio") as there:
            if TAG in _tags(there):  # people may edit the card
                there.write_card(folder / LAYOUT.card, **metadata(model_id))
            stale = [name for name in there.files - names if name.split("/")[0] in (MODEL, SOURCE)]
            return there.replace(folder, sorted(names), without=stale, message=commit_message)


def write(folder: Path, repo_id: str, *, model_id: str | None = None, requirement: str | None = None) -> None:
    """Write the files of a Space, other than the model, into a folder; arguments as in :func:`push`.

    Raises:
        ModuleNotFoundError: if Gradio is not installed.
    """
    name = repo_id.split("/")[1]
    about = {"title": name, "emoji": "🏷️", "colorFrom": "blue", "colorTo": "indigo", "pinned": False}
    facts = {"name": name, "model_id": model_id, "has_source": requirement is None}
    facts["metadata"] = yaml.safe_dump({**about, **metadata(model_id)}, allow_unicode=True, sort_keys=False).strip()
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    for file in ("app.py", LAYOUT.card):
        template = environment.from_string((TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8"))
        (folder / file).write_text(template.render(facts), encoding="utf-8")
    lines = dependencies("serve") if requirement is None else [requirement]
    (folder / "requirements.txt").write_text("\n".join([CPU_TORCH, *lines, ""]), encoding="utf-8")
    if requirement is None:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(hf_xmc.__file__).parent, folder / SOURCE, ignore=ignored)


def metadata(model_id: str | None) -> dict[str, Any]:
    """Return what the Hub must know to run a Space with a model.

    Raises:
        ModuleNotFoundError: if Gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise ModuleNotFoundError("a Space needs the version of gradio that it will run: pip install 'hf_xmc[serve]'.")
    return {
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "models": [model_id] if model_id else [],
        "tags": [TAG],
    }


def dependencies(extra: str) -> list[str]:
    """Return the dependencies of the installed package with one of its extras, as lines of ``requirements.txt``.

    >>> [line.split(">=")[0].split("<")[0] for line in dependencies("skos") if "rdflib" in line]
    ['rdflib']
    """
    parted = [line.partition(";") for line in importlib.metadata.requires("hf_xmc") or ()]
    wanted = ("", f'extra == "{extra}"')
    return [requirement.strip() for requirement, _, marker in parted if marker.strip() in wanted]


def _tags(there: Repository) -> list[str]:
    return there.metadata(LAYOUT.card).get("tags") or []


def _check_replaceable(there: Repository | None, repo_id: str) -> None:
    """Raise if a Space has content that was not made here."""
    if there is None or there.files <= EMPTY or TAG in _tags(there):
        return
    others = sorted(there.files - EMPTY)
    listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    raise ValueError(
        f"the Space {repo_id} has other content ({listed}): choose another name, or delete that Space first. A Space "
        f"that `push_to_space` made has the tag {TAG!r} in its {LAYOUT.card}."
    )


def _check_same(folder: Path, there: Repository | None, model_id: str) -> None:
    """Raise if a repository does not hold the model in a folder."""
    instead = "Push the model there with `push_to_hub` first, or leave `model_id` out to copy it into the Space."
    if there is None or LAYOUT.config not in there.files:
        raise ValueError(f"`model_id` must be a model on the Hub that this token can read, got {model_id!r}. {instead}")
    with TemporaryDirectory() as downloads:
        published = manifest.read(there.read(LAYOUT.config, Path(downloads)))["files"]
    ours = manifest.read(folder / LAYOUT.config)["files"]
    # Configuration files differ by the version of the library that wrote them, weights and embeddings do not.
    tensors = {name for name in {*ours, *published} - REBUILT if name.endswith(".safetensors")}
    if different := sorted(name for name in tensors if ours.get(name) != published.get(name)):
        raise ValueError(f"{model_id} holds another model: {', '.join(different)} differ. {instead}")
