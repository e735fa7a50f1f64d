"""Start a server, on one or several processes."""

from __future__ import annotations

import json
import logging
import logging.config
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import FastAPI

from hf_xmc.model.model import XMCModel
from hf_xmc.serving import page
from hf_xmc.serving.app import create_app
from hf_xmc.serving.logs import log_config
from hf_xmc.serving.metrics import SHARED
from hf_xmc.serving.settings import ServerSettings

TOKEN = "HF_XMC_TOKEN"
WORKER = "HF_XMC_SERVER"  # what a worker must know, as JSON
SECONDS_TO_FINISH = 20  # time that requests, and open pages, get when the server stops
SECONDS_TO_RESPOND = 60  # a worker that takes longer to respond to its parent, such as while it loads, is replaced

logger = logging.getLogger(__name__)


def serve(
    model: str | Path,
    settings: ServerSettings,
    host: str,
    port: int,
    workers: int,
    device: str | None = None,
    verify: bool = True,
    backend: str = "torch",
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Serve a model until the process gets SIGTERM or SIGINT; requests in flight are answered first.

    Args:
        model: A folder, or ``org/name`` of a model of the Hub.
        settings: Settings of the server.
        host, port: Address to listen on; port 0 for a free one.
        workers: Number of processes. Each loads the encoder, and all share the label embeddings, which are mapped into
            memory.
        device: Device of the encoder; by default the best one available.
        verify: Whether each process compares the files of the model with the saved ones, as
            :meth:`hf_xmc.XMCModel.from_pretrained` does.
        backend, model_kwargs: How the encoder is loaded, likewise.

    Raises:
        ValueError: if the model does not load or has no labels, or ``workers`` is not positive.
        ModuleNotFoundError: if the packages of the backend are missing, or do not import together.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    logging.config.dictConfig(log_config())  # uvicorn does so again in each worker
    logging.captureWarnings(True)
    options: dict[str, Any] = {"host": host, "port": port, "log_config": log_config(), "access_log": False}
    options |= {"server_header": False, "timeout_graceful_shutdown": SECONDS_TO_FINISH}
    options["timeout_worker_healthcheck"] = SECONDS_TO_RESPOND
    if host not in ("127.0.0.1", "::1", "localhost") and settings.token is None:
        logger.warning("Anyone who reaches %s can use the model: set %s to require a token.", host, TOKEN)
    with_page = page.is_available() and workers == 1 and settings.token is None
    if not with_page:
        logger.info("There is no page for browsers: it needs Gradio, one worker, and no token.")
    loading: dict[str, Any] = {"device": device, "verify": verify}
    loading |= {"backend": backend, "model_kwargs": model_kwargs}
    app = create_app(XMCModel.from_pretrained(model, **loading), settings, with_page=with_page)
    if workers == 1:
        uvicorn.run(app, **options)
        return
    del app  # it has shown that the workers can load the model
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // workers)))
    os.environ[WORKER] = json.dumps({"model": str(model), "loading": loading, "settings": settings.to_json()})
    with TemporaryDirectory() as folder:
        os.environ[SHARED] = folder
        uvicorn.run("hf_xmc.serving.server:worker_app", factory=True, workers=workers, **options)


def worker_app() -> FastAPI:
    """Return the application of a worker, which :func:`serve` has started."""
    logging.captureWarnings(True)
    about = json.loads(os.environ[WORKER])
    settings = ServerSettings(**json.loads(about["settings"]), token=os.environ.get(TOKEN))
    return create_app(XMCModel.from_pretrained(about["model"], **about["loading"]), settings)
