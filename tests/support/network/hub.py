"""A small Hugging Face hub on loopback: the list of a repository's files, and each file by byte range."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@dataclass
class Hub:
    """What it holds, how it fails, and what it was asked for."""

    files: dict[str, bytes]
    status: int = 200
    error_code: str = ""
    cut_after: list[int | None] = field(default_factory=list)  # bytes after which the next file answers are cut
    silent_after: list[int | None] = field(default_factory=list)  # bytes after which the next file answers stop
    busy: int = 0  # how many of the next file answers are 503
    knows_ranges: bool = True
    sent_instead: dict[str, list[bytes]] = field(default_factory=dict)  # other bytes than it lists, one for an answer
    fetched: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    sent_bytes: int = 0


def entry_of(name: str, content: bytes) -> dict[str, object]:
    """A file in the list of a repository; large formats are kept as LFS."""
    entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if name.endswith((".gguf", ".safetensors")):
        entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
    return entry


def blob_id(content: bytes) -> str:
    """A file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            if hub.status != 200:
                self.send(hub.status, b"{}", {"X-Error-Code": hub.error_code, "X-Error-Message": "refused"}, body)
            elif path.startswith("/api/models/"):
                siblings = [entry_of(name, content) for name, content in hub.files.items()]
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                    for name, content in hub.files.items()
                ]
                info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
                self.send(200, json.dumps(tree if "/tree/" in path else info).encode(), {}, body)
            elif (name := path.partition(f"/resolve/{COMMIT}/")[2] or path.rpartition("/")[2]) not in hub.files:
                self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
            else:
                self.send_file(name, body)

        def send_file(self, name: str, body: bool) -> None:
            content = hub.files[name]
            if body:
                hub.fetched.append(name)
                if hub.busy:
                    hub.busy -= 1
                    self.send(503, b"{}", {}, body)
                    return
                content = hub.sent_instead[name].pop(0) if hub.sent_instead.get(name) else content
            headers = {"ETag": f'"{hashlib.sha1(hub.files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if body and match and hub.knows_ranges:
                hub.ranges.append(match[0])
                first, end = int(match[1]), int(match[2]) + 1 if match[2] else len(content)
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                self.send(206, content[first:end], headers, body, is_file=True)
            else:
                self.send(200, content, headers, body, is_file=True)

        def send(
            self, status: int, content: bytes, headers: dict[str, str], body: bool, *, is_file: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            cut = hub.cut_after.pop(0) if is_file and hub.cut_after else None
            if is_file and hub.silent_after and (stop := hub.silent_after.pop(0)) is not None:
                self.wfile.write(content[:stop])
                self.rfile.read(1)  # until the client leaves
                return
            hub.sent_bytes += len(content[:cut]) if is_file else 0  # before the client has them and counts
            self.wfile.write(content[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, *_arguments: object) -> None:
            return

    return Handler


@contextmanager
def running_hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub with these files, and point huggingface_hub at it."""
    import huggingface_hub.constants

    held = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(held))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    try:
        yield held
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
