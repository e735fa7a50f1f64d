"""Counts and times of a server, for Prometheus."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # folder in which several workers count together


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("hf_xmc_requests", "Requests that were answered.", labels, registry=registry)
        self.errors = Counter(
            "hf_xmc_errors", "Requests that were answered with 4xx or 5xx.", labels, registry=registry
        )
        self.seconds = Histogram(
            "hf_xmc_request_seconds", "Time from request to answer.", ["route"], registry=registry, buckets=SECONDS
        )
        self.texts = Counter("hf_xmc_texts", "Texts that were answered.", registry=registry)
        self.batches = Histogram(
            "hf_xmc_batch_texts", "Texts that the model answered in one call.", registry=registry, buckets=TEXTS
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.requests.labels(method, route, status).inc()
        if status >= 400:
            self.errors.labels(method, route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return the metrics of all workers as text."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
