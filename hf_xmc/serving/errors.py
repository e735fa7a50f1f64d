"""Errors as answers: problem details (RFC 9457) with a sentence that says what to change."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hf_xmc.serving.answering import BadRequest
from hf_xmc.serving.batching import Overloaded
from hf_xmc.serving.schemas import Problem

PLAIN = {"a valid dictionary or object to extract fields from": "a JSON object"}  # words of pydantic in other words
MEDIA_TYPE = "application/problem+json"
REASONS = {
    400: "The request is malformed.",
    401: "The token is missing or wrong.",
    404: "There is no such project.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    422: "An argument is wrong.",
    503: "Too many requests wait, or the model is not calibrated.",
}
SHOWN = 60  # characters of a wrong value in a message


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer for an error."""
    about = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return JSONResponse(about.model_dump(), status, headers, media_type=MEDIA_TYPE)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe errors for OpenAPI."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": REASONS[status], "content": content} for status in statuses}


def add_handlers(app: FastAPI) -> None:
    """Answer every expected error as a problem."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(BadRequest, _bad_request)
    app.add_exception_handler(Overloaded, _overloaded)


def message_of(error: Mapping[str, Any]) -> str:
    """Return an error of pydantic as a sentence.

    >>> about = {"type": "int_type", "loc": ("body", "top_k"), "msg": "Input should be a valid integer", "input": "x"}
    >>> message_of(about)
    "`top_k` must be a valid integer, got 'x'."
    """
    place, message, given = error["loc"], str(error["msg"]), ascii(error.get("input"))
    name = ".".join(map(str, place[1:])) or str(place[0] if place else "body")
    given = given if len(given) <= SHOWN else f"{given[:SHOWN]}..."
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it ends early")
        return f"the body must be valid JSON, got an error at character {place[-1]}: {reason}."
    if error["type"] == "missing":
        return f"`{name}` must be given, and is missing."
    if error["type"] == "extra_forbidden":
        return f"`{name}` is not a known argument."
    if message.startswith("Input should be "):
        wanted = message.removeprefix("Input should be ")
        return f"`{name}` must be {PLAIN.get(wanted, wanted)}, got {given}."
    return f"`{name}` must be valid ({message}), got {given}."


def _status(request: Request) -> int:
    return 400 if request.url.path.startswith("/v1/") else 422  # Annif's API knows 400 alone


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return problem(_status(request), " ".join(message_of(one) for one in error.errors()[:5]))


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    return problem(_status(request), str(error))


async def _overloaded(request: Request, error: Exception) -> JSONResponse:
    return problem(503, str(error), {"Retry-After": "1"})
