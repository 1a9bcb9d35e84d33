"""Generating greedily by hand through POST /forward: token ids into the first stage, raw activations through the rest.

`urls` are those of the stages, or of the coordinator's paths for them; only what the routes document is used.
"""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np

RAW = "application/octet-stream"
ANSWER_SECONDS = 120.0
ITEM_TYPES = {"float32": np.float32, "int32": np.int32}


class Raw:
    """Forwards as raw bytes to one address."""

    def __init__(self, url: str, credential: str, path: str = "/forward") -> None:
        self._where = urlsplit(url)
        self._path = self._where.path + path
        self._credential = credential

    def send(self, session_id: str, numbers: np.ndarray[Any, Any], **query: Any) -> tuple[int, Any]:
        """One forward of token ids (integers) or activations; an answer of raw bytes comes back as an array."""
        dtype = "int32" if numbers.dtype.kind == "i" else "float32"
        body = numbers.astype(ITEM_TYPES[dtype]).tobytes()
        asked = {"session_id": session_id, **query}
        status, answer = self.send_bytes(asked, body, dtype, ",".join(map(str, numbers.shape)))
        return status, answer

    def send_bytes(self, query: Mapping[str, Any], body: bytes, dtype: str, shape: str) -> tuple[int, Any]:
        """The same with any headers and body."""
        connection = http.client.HTTPConnection(self._where.hostname, self._where.port, timeout=ANSWER_SECONDS)
        headers = {"Content-Type": RAW, "Accept": RAW, "X-Noodle-Dtype": dtype, "X-Noodle-Shape": shape}
        headers["Authorization"] = f"Bearer {self._credential}"
        try:
            connection.request("POST", f"{self._path}?{urlencode(query)}", body, headers)
            response = connection.getresponse()
            answer = response.read()
            if response.getheader("Content-Type") != RAW:
                return response.status, answer
            sizes = [int(size) for size in response.headers["X-Noodle-Shape"].split(",")]
            numbers = np.frombuffer(answer, ITEM_TYPES[response.headers["X-Noodle-Dtype"]]).reshape(sizes)
            return response.status, numbers
        finally:
            connection.close()


def generate_by_hand(
    urls: Sequence[str], credential: str, prompt: Sequence[int], new_tokens: int, *, chunk_tokens: int = 200
) -> list[int]:
    """Greedy token ids after the prompt, by the stages in their order; the prompt in chunks, then token by token."""
    stages = [Raw(url, credential) for url in urls]
    session_id = uuid.uuid4().hex
    position, last = 0, None
    generated: list[int] = []
    pending = list(prompt)
    while len(generated) < new_tokens:
        ids, pending = pending[:chunk_tokens], pending[chunk_tokens:]
        numbers: Any = np.array(ids, np.int32)
        for stage in stages:
            status, numbers = stage.send(session_id, numbers, token_index=position)
            assert status == 200, json.loads(numbers)
        position += len(ids)
        last = int(numbers[0])
        if not pending:
            generated.append(last)
            pending = [last]
    return generated
