"""The REST API of Annif, so that its clients and its ``http`` backend can use a model.

A server has one project: its model. Scores are probabilities, so the model must be calibrated.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import hf_xmc
from hf_xmc.serving.answering import BadRequest, Options
from hf_xmc.serving.errors import described
from hf_xmc.serving.service import Service, service_of
from hf_xmc.serving.settings import MAX_TOP_K

Limit = Annotated[int, Query(ge=0, description=f"Maximum number of labels; at most {MAX_TOP_K} are returned.")]
Threshold = Annotated[float, Query(ge=0, le=1, description="Minimum probability of a label.")]
Language = Annotated[str | None, Query(description="Language of the labels.")]


class SuggestForm(BaseModel):
    """The form of a request; further fields such as ``metadata_title`` have no effect."""

    model_config = ConfigDict(extra="ignore")

    text: str
    limit: int = Field(10, ge=0, description=f"Maximum number of labels; at most {MAX_TOP_K} are returned.")
    threshold: float = Field(0.0, ge=0, le=1, description="Minimum probability of a label.")
    language: str | None = Field(None, description="Language of the labels.")


class Document(BaseModel):
    """A text, and the name by which its answer is found; metadata have no effect."""

    text: str
    document_id: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)


class Documents(BaseModel):
    """The body of a request with several texts."""

    documents: list[Document]


class Suggestion(BaseModel):
    """A label of a text."""

    uri: str = Field(description="The uid of the label.")
    label: str
    notation: str | None = None
    score: float


class Suggestions(BaseModel):
    """The labels of a text, best first."""

    results: list[Suggestion]


class DocumentSuggestions(Suggestions):
    """The labels of a text, best first, and the name of the text."""

    document_id: str | None = None


def router() -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/v1", tags=["Annif"])
    form = {"content": {"application/x-www-form-urlencoded": {"schema": SuggestForm.model_json_schema()}}}
    posts: dict[str, Any] = {"methods": ["POST"], "responses": described(400, 401, 404, 408, 413, 503)}
    routes.add_api_route("/", info, responses=described(401), summary="Tell the version")
    routes.add_api_route("/projects", projects, responses=described(401), summary="List the one project")
    routes.add_api_route("/projects/{project_id}", project, responses=described(401, 404), summary="Describe a project")
    routes.add_api_route(
        "/projects/{project_id}/suggest",
        suggest,
        response_model=Suggestions,
        openapi_extra={"requestBody": {**form, "required": True}},
        summary="Predict the labels of a text",
        **posts,
    )
    routes.add_api_route(
        "/projects/{project_id}/suggest-batch",
        suggest_batch,
        response_model=list[DocumentSuggestions],
        summary="Predict the labels of several texts",
        **posts,
    )
    return routes


async def info() -> dict[str, str]:
    """Return the name and the version of the server."""
    return {"title": "hf_xmc", "version": hf_xmc.__version__}


async def projects(request: Request) -> dict[str, Any]:
    """Return the project of the model."""
    return {"projects": [_about(service_of(request))]}


async def project(request: Request, project_id: str) -> dict[str, Any]:
    """Return the project with this id."""
    return _about(_service(request, project_id))


async def suggest(request: Request, project_id: str) -> dict[str, Any]:
    """Return the labels of a text."""
    service = _service(request, project_id)
    async with request.form(max_part_size=service.settings.max_body_bytes) as given:
        try:
            form = SuggestForm.model_validate(dict(given))
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
            raise RequestValidationError(found) from None
    (labels,) = await _predict(request, service, [form.text], form.limit, form.threshold, form.language)
    return {"results": labels}


async def suggest_batch(
    request: Request,
    project_id: str,
    body: Documents,
    limit: Limit = 10,
    threshold: Threshold = 0.0,
    language: Language = None,
) -> list[dict[str, Any]]:
    """Return the labels of several texts, in their order."""
    texts = [document.text for document in body.documents]
    answers = await _predict(request, _service(request, project_id), texts, limit, threshold, language)
    return [
        {"results": labels, "document_id": document.document_id}
        for labels, document in zip(answers, body.documents, strict=True)
    ]


async def _predict(
    request: Request, service: Service, texts: list[str], limit: int, threshold: float, language: str | None
) -> list[list[dict[str, Any]]]:
    if service.model.calibration is None:
        raise HTTPException(
            503, "the model must be calibrated to give Annif probabilities: call `calibrate`, and save."
        )
    if language not in (None, "", service.settings.language):
        raise BadRequest(f"`language` must be {service.settings.language!r}, got {language!r}.")
    options = Options(top_k=max(1, min(limit, MAX_TOP_K)), threshold=threshold or None)
    return [
        [
            {"uri": label["uid"], "label": label["text"], "notation": None, "score": label["score"]}
            for label in labels[:limit]
            if label["score"] > 0  # Annif counts a score of 0 as no label
        ]
        for labels in await service.predict(request, texts, options)
    ]


def _service(request: Request, project_id: str) -> Service:
    service = service_of(request)
    if project_id != service.settings.name:
        raise HTTPException(404, f"project {project_id!r} not found; the server has {service.settings.name!r}.")
    return service


def _about(service: Service) -> dict[str, Any]:
    name, language = service.settings.name, service.settings.language
    return {
        "project_id": name,
        "name": name,
        "language": language,
        "backend": {"backend_id": "hf_xmc"},
        "vocab": {"vocab_id": name, "languages": [language], "size": service.labels.num_rows, "loaded": True},
        "vocab_language": language,
        "is_trained": service.model.calibration is not None,
        "modification_time": None,
    }
