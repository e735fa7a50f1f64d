"""The parts that the routes of a server share."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from fastapi import Request

from hf_xmc.model.model import XMCModel
from hf_xmc.serving.answering import BadRequest, Options, answer
from hf_xmc.serving.batching import Batcher
from hf_xmc.serving.metrics import Metrics
from hf_xmc.serving.settings import MAX_EXPLAINED, MAX_WAITING, ServerSettings

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no encoder reads


class Service(NamedTuple):
    """A model with its queue, limits and metrics."""

    model: XMCModel
    settings: ServerSettings
    metrics: Metrics
    batcher: Batcher
    labels: pa.Table  # a row for each label of the model

    @classmethod
    def of(cls, model: XMCModel, settings: ServerSettings) -> Service:
        """Prepare a model to be served."""
        metrics = Metrics()

        def observed(texts: list[str], options: Options) -> list[list[dict[str, Any]]]:
            answers = answer(model, texts, options)
            if texts:
                metrics.batches.observe(len(texts))
                metrics.texts.inc(len(texts))
            return answers

        batcher = Batcher(observed, settings.batch_size, settings.batch_wait_ms / 1000, MAX_WAITING)
        return cls(model, settings, metrics, batcher, model.labels.with_format("arrow")[:])

    async def predict(self, request: Request, texts: list[str], options: Options) -> list[list[dict[str, Any]]]:
        """Return the labels of each text, after a check of the limits.

        Raises:
            BadRequest: if there are too many texts, a text is too long, or an option is wrong.
        """
        log: dict[str, Any] = request.state.log
        log["texts"] = len(texts)
        if self.settings.log_texts:
            log["text"] = texts
        return await self.answer(texts, options)

    async def answer(self, texts: list[str], options: Options) -> list[list[dict[str, Any]]]:
        """Return the labels of each text, as :meth:`predict` does, without a request to log."""
        self._check(texts, options)
        return await self.batcher.submit(texts, options)

    def _check(self, texts: list[str], options: Options) -> None:
        most = MAX_EXPLAINED if options.explain else self.settings.max_texts
        if len(texts) > most:
            reason = " with `explain`" if options.explain else ""
            raise BadRequest(f"`texts` must be at most {most} texts{reason}, got {len(texts)}. Send several requests.")
        longest = self.settings.max_characters
        for number, text in enumerate(texts):
            if len(text) > longest:
                raise BadRequest(f"`texts.{number}` must have at most {longest} characters, got {len(text)}.")

        for name, given in (("texts", texts), ("allow", options.allow), ("deny", options.deny)):
            for number, text in enumerate(given or ()):
                if SURROGATE.search(text):
                    raise BadRequest(f"`{name}.{number}` must be valid Unicode, got half of a surrogate pair.")

    def labels_with(self, prefix: str, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Return the first labels whose text starts with ``prefix``, in any case, and the number of all of them."""
        found = self.labels
        if prefix:
            found = found.filter(pc.starts_with(found["text"], prefix, ignore_case=True))
        return found.slice(0, limit).to_pylist(), found.num_rows


def service_of(request: Request) -> Service:
    """Return the service of the application that got a request."""
    service: Service = request.app.state.service
    return service
