"""The application that serves a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import HTTPBearer

import hf_xmc
from hf_xmc.model.model import XMCModel
from hf_xmc.serving import annif, api, page
from hf_xmc.serving.errors import add_handlers
from hf_xmc.serving.middleware import BodyLimit, Observer, TokenCheck
from hf_xmc.serving.service import Service
from hf_xmc.serving.settings import ServerSettings

DESCRIPTION = "The labels of texts, by `POST /predict`."


def create_app(model: XMCModel, settings: ServerSettings | None = None, *, with_page: bool = False) -> FastAPI:
    """Return an application that serves a model; run it with uvicorn or any other ASGI server.

    Args:
        model: A model with labels.
        settings: Settings of the server.
        with_page: Whether to add a page for browsers. It needs Gradio and a single process, and no token: browsers
            send none.

    Raises:
        ValueError: if the model has no label, or there are a page and a token.
        ModuleNotFoundError: if there is a page and Gradio is not installed.
    """
    settings = ServerSettings() if settings is None else settings
    if not len(model.labels):
        raise ValueError("`model` must have labels to predict, got none: give it some by `hf-xmc index`.")
    if with_page and settings.token is not None:
        raise ValueError("`with_page` must be False with a token, which browsers do not send, got True.")
    service = Service.of(model, settings)
    # The middleware checks the token; this only declares it, so that /docs can send it.
    declared = [Depends(HTTPBearer(auto_error=False))] if settings.token else []
    app = FastAPI(
        title=f"hf_xmc: {settings.name}",
        version=hf_xmc.__version__,
        description=DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
    )
    app.state.service = service
    for routes in (api.router(), annif.router()):
        app.include_router(routes, dependencies=declared)
    if with_page:
        app.add_api_route("/page", _to_first, include_in_schema=False)  # the address of older versions
        page.mount(app, service)
    app.add_api_route("/", _first, include_in_schema=False)
    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.max_body_seconds)
    if settings.token is not None:
        app.add_middleware(TokenCheck, token=settings.token)
    app.add_middleware(Observer, metrics=service.metrics)  # the last one is the outermost
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Answer requests from the start of the server to its end."""
    service: Service = app.state.service
    answering = asyncio.create_task(service.batcher.run())
    yield
    answering.cancel()
    with suppress(asyncio.CancelledError):
        await answering


async def _first(request: Request) -> Response:
    """Tell clients of the API where it is described, and send browsers there if there is no page."""
    if not page.wants_json(request.scope):
        return RedirectResponse("docs")
    name = request.app.state.service.settings.name
    return JSONResponse({"model": name, "docs": "/docs", "openapi": "/openapi.json"})


async def _to_first() -> RedirectResponse:
    return RedirectResponse("./")
