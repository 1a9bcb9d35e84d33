"""Sends requests to a server and records when their tokens arrive, in one thread with little work.

The same cores also compute.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.clients.event_reader import READ_SECONDS
from tests.support.processes.cluster import Cluster

READ_BYTES = 1 << 16
SILENCE_SECONDS = 600.0  # until the first token of a long prompt on a slow core

CountTokens = Callable[[bytes, int], int]  # tokens that have arrived, by an event and those before it


@dataclass(frozen=True)
class Side:
    """A server that streams tokens: the body of a request, and how its events count tokens."""

    port: int
    path: str
    body_of: Callable[[Sequence[int], int], dict[str, Any]]
    count_tokens: CountTokens
    silence_seconds: float = SILENCE_SECONDS  # that it may take until a token


def noodle_side(port: int, silence_seconds: float = SILENCE_SECONDS) -> Side:
    """Return noodle's side: each event is one token."""

    def body_of(ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
        return {"inputs": list(ids), "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True}}

    return Side(port, "/generate_stream", body_of, lambda _event, before: before + 1, silence_seconds)


@dataclass
class Arrivals:
    """One request: when it was sent, and pairs of a time and the tokens that had arrived by then."""

    connection: socket.socket
    sent: float
    counts: list[tuple[float, int]] = field(default_factory=list)
    rest: bytes = b""  # the beginning of the next event
    head: bytes = b""  # the first bytes, for the error message

    def count_at(self, when: float) -> int:
        """Return how many tokens had arrived."""
        return max((count for at, count in self.counts if at <= when), default=0)


def together(side: Side, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Arrivals]:
    """Return the arrivals of each request's tokens, for all prompts at once; fail if an answer has not all tokens."""
    requests = [_sent(side, ids, new_tokens) for ids in prompts]
    with selectors.DefaultSelector() as selector:
        for each in requests:
            selector.register(each.connection, selectors.EVENT_READ, each)
        while selector.get_map():
            ready = selector.select(side.silence_seconds)
            if not ready:
                raise TimeoutError(f"no stream had a token for {side.silence_seconds:.0f} seconds")
            for key, _ in ready:
                if not _read(side, key.data):
                    selector.unregister(key.fileobj)
                    key.data.connection.close()
    for each in requests:
        assert each.counts, each.head
        assert each.counts[-1][1] == new_tokens, (each.counts[-1], each.head)
    return requests


def arrival_times(cluster: Cluster, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
    """Return the arrival times of each of noodle's streams' tokens, for all prompts at once."""
    requests = together(noodle_side(cluster.port, READ_SECONDS), prompts, new_tokens)
    return [[at for at, _ in each.counts] for each in requests]


def _sent(side: Side, ids: Sequence[int], new_tokens: int) -> Arrivals:
    body = json.dumps(side.body_of(ids, new_tokens)).encode()
    lines = [f"POST {side.path} HTTP/1.1", f"Host: 127.0.0.1:{side.port}", "Content-Type: application/json",
             f"Content-Length: {len(body)}", "Connection: close"]  # fmt: skip
    connection = socket.create_connection(("127.0.0.1", side.port), timeout=side.silence_seconds)
    sent = time.monotonic()
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return Arrivals(connection, sent)


def _read(side: Side, request: Arrivals) -> bool:
    """Record the tokens in the received bytes; return False at the end of the stream."""
    received = request.connection.recv(READ_BYTES)
    now = time.monotonic()
    request.head = request.head or received
    *lines, request.rest = (request.rest + received).split(b"\n")
    for line in lines:
        if line.startswith(b"data:"):
            before = request.counts[-1][1] if request.counts else 0
            count = side.count_tokens(line, before)
            if count > before:
                request.counts.append((now, count))
    return bool(received)
