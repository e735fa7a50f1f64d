"""Log lines in JSON."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import datetime, timezone
from typing import Any

REQUESTS = "hf_xmc.serving.requests"  # logger with a line for each request


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record: time, level, logger, message, and the fields of ``extra={"fields": ...}``.

    An exception is logged as its type and the lines of code it went through. Its message is left out, because it may
    quote a text.
    """

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            row["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            row["frames"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(row)


def log_config() -> dict[str, Any]:
    """Return a configuration for :func:`logging.config.dictConfig`: all lines go to standard error."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "hf_xmc.serving.logs.JsonFormatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"hf_xmc": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
    }
