"""``hf-xmc serve``: a model over HTTP."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from hf_xmc.cli.loading import add_options, loading_of

EPILOG = """Example:
  hf-xmc serve runs/books/model --port 8000
  curl localhost:8000/predict --json '{"texts": ["a history of whaling"]}'

HF_XMC_TOKEN in the environment makes clients send `Authorization: Bearer TOKEN`. The API is described at /docs."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of ``hf-xmc``."""
    serve = add("serve", help="serve a model over HTTP, with a JSON API and the REST API of Annif")
    serve.add_argument("model", help="folder of a model, output_dir of `hf-xmc train`, or a model on the Hub")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for a free one")
    serve.add_argument("--workers", type=int, default=1, help="number of processes")
    serve.add_argument("--name", help="name of the model, and its project in Annif's API (default: that of the folder)")
    serve.add_argument("--language", default="en", help="language of the labels, as Annif's API states it")
    add_options(serve)
    serve.add_argument(
        "--no-verify", action="store_false", dest="verify", help="load the model by file sizes, without hashing files"
    )
    limits = serve.add_argument_group("limits")
    limits.add_argument("--max_texts", type=int, default=1000, help="texts in a request")
    limits.add_argument("--max_characters", type=int, default=100_000, help="characters of a text")
    limits.add_argument("--max_body_bytes", type=int, default=10_000_000, help="size of a request")
    limits.add_argument("--max_body_seconds", type=float, default=60, help="time that a request takes to arrive")
    batches = serve.add_argument_group("batches")
    batches.add_argument("--batch_size", type=int, default=256, help="texts from which on a batch is full")
    batches.add_argument("--batch_wait_ms", type=float, default=2, help="time a request waits for others")
    serve.add_argument("--log_texts", action="store_true", help="write texts into the log")
    serve.epilog = EPILOG
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from hf_xmc.serving.server import TOKEN, serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'hf_xmc[serve]'.") from None
    from hf_xmc.serving.settings import ServerSettings

    arguments.name = arguments.name or re.sub(r"[^\w.-]", "-", Path(arguments.model).resolve().name)
    known = {field.name for field in fields(ServerSettings)} - {"token"}
    settings = ServerSettings(
        **{name: value for name, value in vars(arguments).items() if name in known}, token=os.environ.get(TOKEN)
    )
    load = {**loading_of(arguments), "verify": arguments.verify}
    serve(arguments.model, settings, arguments.host, arguments.port, arguments.workers, **load)
