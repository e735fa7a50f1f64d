"""``hf-xmc push``: publish a trained model on the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from hf_xmc.cli.streams import write_row


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of ``hf-xmc``."""
    push = add("push", help="publish a trained model, with its card, on the Hub")
    push.add_argument("folder", type=Path, help="output_dir of `hf-xmc train`, or the folder of a saved model")
    push.add_argument("repo_id", help="org/name of the repository, which is created if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch to commit to (default: main)")
    push.add_argument("--create_pr", action="store_true", help="open a pull request instead of a commit")
    push.add_argument("--space", action="store_true", help="publish the page of the model as the Space repo_id instead")
    space = push.add_argument_group("with --space")
    space.add_argument("--model_id", help="org/name of the model on the Hub to show (default: a copy in the Space)")
    space.add_argument("--requirement", help="line of requirements.txt for hf_xmc (default: a copy in the Space)")
    push.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> None:
    from hf_xmc.model.model import XMCModel
    from hf_xmc.storage.commits import check_token

    if not arguments.folder.is_dir():
        raise ValueError(
            "`folder` must be the output_dir of a training run or the folder of a model, got "
            f"{str(arguments.folder)!r}."
        )
    taken, refused = ("revision", "create_pr"), ("model_id", "requirement")
    if arguments.space:
        taken, refused = refused, taken
    for name in refused:
        if getattr(arguments, name):
            raise ValueError(
                f"--{name} has no effect {'with' if arguments.space else 'without'} --space: leave it out."
            )
    options = {name: getattr(arguments, name) for name in ("private", *taken)}
    try:
        check_token(arguments.repo_id)  # before the model is read
        model = XMCModel.from_pretrained(arguments.folder)
        address = (model.push_to_space if arguments.space else model.push_to_hub)(arguments.repo_id, **options)
    except RuntimeError as error:  # a message for users
        raise OSError(str(error)) from error
    write_row({"repo_id": arguments.repo_id, "commit": address})
