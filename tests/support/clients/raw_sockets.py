"""Misbehaving clients as raw sockets."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.processes.cluster import request

ANSWER_SECONDS = 60.0

HALF_HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half:"
UNSENT_BODY = (
    b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
)
SERVED_AND_STAYING = b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
KINDS = (b"", HALF_HEAD, UNSENT_BODY, SERVED_AND_STAYING)


def connect(port: int, sent: bytes = b"", *, receive_buffer_bytes: int = 0) -> socket.socket:
    """Return a connection on which `sent` has been sent."""
    connection = socket.socket()
    if receive_buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.settimeout(ANSWER_SECONDS)
    connection.connect(("127.0.0.1", port))
    connection.sendall(sent)
    return connection


@contextlib.contextmanager
def anonymous_clients(ports: list[int], count: int, kinds: tuple[bytes, ...] = KINDS) -> Iterator[list[socket.socket]]:
    """Open `count` connections to each port, alternating between kinds; close all at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(port, kinds[i % len(kinds)])) for i in range(count) for port in ports]


def post(path: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    """Return the bytes of a POST with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    if not any(header.startswith("Transfer-Encoding") for header in headers):
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_to_end(connection: socket.socket) -> bytes:
    """Return everything received until the peer closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def final_answer(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the final answer, after any "100 Continue"."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100 "):
        return final_answer(body)
    first, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), fields, body


def health_seconds(port: int, token: str = "") -> float:
    """Return the seconds /health takes on a new connection; it must answer 200."""
    started = time.monotonic()
    status, answer = request(port, "GET", "/health", token=token)
    assert status == 200, answer
    return time.monotonic() - started


def thread_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def file_count(pid: int) -> int:
    """Return the number of files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
