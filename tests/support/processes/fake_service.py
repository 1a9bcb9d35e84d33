"""A stand-in for a service: answers /health from files, and records its starts and stops.

It reads orders from the folder FAKE_ORDERS: <name>.health (the JSON to answer), <name>.exit (end at the start with
these lines on stderr and the code of the first), <name>.stubborn (ignore SIGTERM), <name>.worker (fork a worker that
outlives its master). It appends to `starts` and `stops` there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

READY = {"status": "ready", "detail": "", "progress": None}


def run(service: str) -> None:
    orders = Path(os.environ["FAKE_ORDERS"])
    name = f"stage-{os.environ['NOODLE_STAGE_ID']}" if service == "stage" else service
    _append(orders / "starts", f"{name} {os.getpid()}")
    (orders / f"{name}.environment").write_text(json.dumps(dict(os.environ)))
    exit_order = orders / f"{name}.exit"
    if exit_order.exists():
        code, *lines = exit_order.read_text().splitlines()
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        sys.exit(int(code))
    host, _, port = os.environ[f"NOODLE_{service.upper()}_BIND"].rpartition(":")
    if (orders / f"{name}.worker").exists() and os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _append(orders / "workers", str(os.getpid()))
        while True:
            signal.pause()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = orders / f"{name}.health"
            answer: dict[str, Any] = json.loads(path.read_text()) if path.exists() else READY
            body = json.dumps({"service": service, **answer}).encode()
            self.send_response(503 if answer["status"] == "failed" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, int(port)), Handler)
    server.daemon_threads = True

    def stop(_number: int, _frame: object) -> None:
        if not (orders / f"{name}.stubborn").exists():
            threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    print(f"{name} serves", flush=True)
    server.serve_forever(poll_interval=0.02)
    _append(orders / "stops", name)


def prepare_model() -> None:
    """Print what the model store prints on its standard output."""
    orders = Path(os.environ["FAKE_ORDERS"])
    _append(orders / "starts", f"model {os.getpid()}")
    if (orders / "model.wait").exists():
        signal.pause()
    lines = orders / "model.lines"
    progress = {"activity": "convert", "detail": "writing", "bytes_done": 5, "bytes_total": 10}
    default = [{"progress": progress}, {"path": "/models/fake", "name": "fake-model"}]
    said = lines.read_text() if lines.exists() else "".join(json.dumps(line) + "\n" for line in default)
    sys.stdout.write(said)
    sys.stdout.flush()
    sys.exit(1 if '"error"' in said else 0)


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
