"""Log lines on stdout: one per important event, as text for a terminal or JSON for a container; never a prompt.

A line about a request has its id: an HTTP thread binds it once (`bind_request`), other threads pass it with the line
(`extra=about(request_id)`).
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


def bind_request(request_id: str) -> None:
    """Add this request id to all later lines of this thread; an empty id ends it."""
    _request_id.set(request_id)


def about(request_id: str) -> dict[str, str]:
    """Return `extra` for one line about a request."""
    return {"request_id": request_id}


def add_request_id(record: logging.LogRecord) -> bool:
    """Add the request id to a record, empty for none; a filter that drops nothing."""
    record.request_id = getattr(record, "request_id", "") or _request_id.get()
    return True


class PrettyFormatter(logging.Formatter):
    """Time, service, level, message and request id, for a terminal."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s {service} %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        line = super().formatMessage(record)
        return f"{line} [request {request_id}]" if (request_id := getattr(record, "request_id", "")) else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, message, and the request id and traceback if there are any."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            line["request"] = request_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logs(service: str, log_format: str) -> None:
    """Send this process's log lines to stdout in a format, "pretty" or "json"."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(add_request_id)
    handler.setFormatter(JsonFormatter(service) if log_format == "json" else PrettyFormatter(service))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("urllib3", "httpx", "filelock", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
