"""An HTTP server that answers each path as a test sets it, and records the requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One received request."""

    method: str
    path: str
    authorization: str
    body: Any


@dataclass
class StandIn:
    """Answers by path: (status, body, headers); a list as body is sent piece by piece, without a length."""

    url: str = ""
    answers: dict[str, tuple[int, Any, dict[str, str]]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def answer(self, path: str, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Set the answer of a path; a dict is sent as JSON."""
        self.answers[path] = (status, body, headers or {})

    def stream(self, path: str, *events: Any, end: str = "data: [DONE]\n\n") -> None:
        """Set server-sent events as the answer; each is a JSON value, or text sent as it is."""
        parts = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
        self.answer(path, [*parts, end], headers={"Content-Type": "text/event-stream"})


@contextmanager
def http_stand_in() -> Iterator[StandIn]:
    """Serve a stand-in on its own port."""
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            stand_in.asked.append(Asked(self.command, self.path, self.headers.get("Authorization", ""), body))
            status, content, headers = stand_in.answers.get(self.path, (404, {"error": {"message": "no such"}}, {}))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for part in content if isinstance(content, list) else [content]:
                self.wfile.write(json.dumps(part).encode() if isinstance(part, dict) else part.encode())
                self.wfile.flush()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
