"""Reads many streams in one thread with little work, because the same cores also compute."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.support.clients.event_reader import READ_SECONDS
from tests.support.processes.cluster import Cluster

MARK = b"data:"  # the beginning of a token's event
READ_BYTES = 1 << 16


@dataclass
class Stream:
    """One request and the arrival time of each token."""

    connection: socket.socket
    arrivals: list[float] = field(default_factory=list)
    rest: bytes = b""  # received bytes that may be the beginning of a mark
    head: bytes = b""  # the first bytes, for the error message


def together(cluster: Cluster, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
    """Return the arrival times of each stream's tokens, for all prompts at once."""
    streams = [_begun(cluster.port, ids, new_tokens) for ids in prompts]
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.connection, selectors.EVENT_READ, stream)
        while selector.get_map():
            ready = selector.select(READ_SECONDS)
            if not ready:
                raise TimeoutError(f"no stream had a token for {READ_SECONDS:.0f} seconds")
            for key, _ in ready:
                if not _read(key.data):
                    selector.unregister(key.fileobj)
                    key.data.connection.close()
    for stream in streams:
        assert len(stream.arrivals) == new_tokens, (len(stream.arrivals), stream.head)
    return [stream.arrivals for stream in streams]


def _begun(port: int, ids: Sequence[int], new_tokens: int) -> Stream:
    parameters = {"max_new_tokens": new_tokens, "ignore_eos": True}
    body = json.dumps({"inputs": list(ids), "parameters": parameters}).encode()
    lines = ["POST /generate_stream HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json",
             f"Content-Length: {len(body)}", "Connection: close"]  # fmt: skip
    connection = socket.create_connection(("127.0.0.1", port), timeout=READ_SECONDS)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return Stream(connection)


def _read(stream: Stream) -> bool:
    """Record the tokens in the received bytes; return False at the end of the stream."""
    came = stream.connection.recv(READ_BYTES)
    now = time.monotonic()
    stream.head = stream.head or came
    data = stream.rest + came
    stream.arrivals += [now] * data.count(MARK)
    stream.rest = data[-(len(MARK) - 1) :]
    return bool(came)
