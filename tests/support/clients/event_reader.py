"""Reads server-sent events on its own socket, and may disconnect at any moment."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

READ_SECONDS = 60.0


class EventReader:
    """One stream of events; iterating yields (id, data) pairs. Leaving the `with` block closes the connection."""

    def __init__(self, port: int, method: str, path: str, body: Any = None, **headers: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READ_SECONDS)
        data = None if body is None else json.dumps(body).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            sent["Content-Type"] = "application/json"
        self._connection.request(method, path, data, sent)
        self._answer = self._connection.getresponse()
        self.status = self._answer.status
        self.request_id = self._answer.getheader("X-Request-Id") or ""
        self.retry_after = self._answer.getheader("Retry-After") or ""

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()
        self._connection.close()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        event_id = ""
        for raw in self._answer:
            line = raw.decode().rstrip("\n")
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                yield event_id, json.loads(line[6:])

    def take(self, count: int) -> list[tuple[str, Any]]:
        """Return the next events, at most `count`."""
        events = []
        for event in self:
            events.append(event)
            if len(events) == count:
                break
        return events
