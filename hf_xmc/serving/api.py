"""The JSON API: labels of texts, labels of the model, health and metrics."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

import hf_xmc
from hf_xmc.serving.answering import Options
from hf_xmc.serving.errors import described
from hf_xmc.serving.schemas import Health, LabelsResponse, PredictRequest, PredictResponse
from hf_xmc.serving.service import service_of
from hf_xmc.serving.settings import MAX_LISTED


def router() -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    routes.add_api_route(
        "/predict",
        predict,
        methods=["POST"],
        response_model=PredictResponse,
        response_model_exclude_unset=True,
        responses=described(400, 401, 408, 413, 422, 503),
        summary="Predict the labels of texts",
    )
    routes.add_api_route(
        "/labels",
        labels,
        response_model=LabelsResponse,
        responses=described(401, 422),
        summary="List labels of the model",
    )
    routes.add_api_route("/health", health, response_model=Health, summary="Tell that the server is ready")
    routes.add_api_route(
        "/metrics", metrics, response_class=Response, responses=described(401), summary="Metrics for Prometheus"
    )
    return routes


async def predict(request: Request, body: PredictRequest) -> dict[str, Any]:
    """Return the labels of each text, best first.

    Requests that arrive together are answered in one batch. Their scores may differ in the last bits from those of a
    request that is answered alone.
    """
    allow, deny = (None if uids is None else tuple(uids) for uids in (body.allow, body.deny))
    options = Options(body.top_k, body.threshold, allow, deny, body.explain)
    return {"predictions": await service_of(request).predict(request, body.texts, options)}


def labels(
    request: Request,
    prefix: Annotated[str, Query(description="Beginning of the label text, in upper or lower case.")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="Maximum number of labels.")] = 20,
) -> dict[str, Any]:
    """Return labels of the model, in its order."""
    rows, total = service_of(request).labels_with(prefix, limit)
    return {"labels": rows, "total": total}


async def health(request: Request) -> dict[str, Any]:
    """Return the state of the server."""
    service = service_of(request)
    return {
        "status": "ok",
        "model": service.settings.name,
        "num_labels": service.labels.num_rows,
        "calibrated": service.model.calibration is not None,
        "version": hf_xmc.__version__,
    }


def metrics(request: Request) -> Response:
    """Return requests, errors, times, texts and batch sizes, in the text format of Prometheus."""
    return Response(service_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
