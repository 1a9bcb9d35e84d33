"""An HTTP server that answers each path with bytes a test gives it, and remembers what it was asked."""

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
    """One request as it came."""

    method: str
    path: str
    authorization: str
    body: Any


@dataclass
class StandIn:
    """Answers by path: (status, body, headers); a body that is a list is sent piece by piece, without a length."""

    url: str = ""
    answers: dict[str, tuple[int, Any, dict[str, str]]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def answer(self, path: str, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """From now on; a dict becomes JSON."""
        self.answers[path] = (status, body, headers or {})

    def stream(self, path: str, *events: Any, end: str = "data: [DONE]\n\n") -> None:
        """Server-sent events, each a JSON value or text as it stands."""
        parts = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
        self.answer(path, [*parts, end], headers={"Content-Type": "text/event-stream"})


@contextmanager
def http_stand_in() -> Iterator[StandIn]:
    """A stand-in on a port of its own."""
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
