"""Greedy generation by hand through POST /forward: token ids into the first stage, activations through the rest.

`urls` are those of the stages, or of the coordinator's paths for them; only what the routes document is used.
"""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

ANSWER_SECONDS = 120.0


def forward(url: str, credential: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Send one forward to one address; return status and decoded answer."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=ANSWER_SECONDS)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {credential}"}
    try:
        connection.request("POST", f"{where.path}/forward", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def generate_by_hand(
    urls: Sequence[str], credential: str, prompt: Sequence[int], new_tokens: int, *, chunk_tokens: int = 200
) -> list[int]:
    """Return greedy token ids after the prompt: the prompt goes through the stages in chunks, then each token alone."""
    session_id = uuid.uuid4().hex
    position = 0
    generated: list[int] = []
    pending = list(prompt)
    while len(generated) < new_tokens:
        ids, pending = pending[:chunk_tokens], pending[chunk_tokens:]
        output: dict[str, Any] = {"token_ids": ids}
        for url in urls:
            given = {name: output[name] for name in ("token_ids", "activations") if name in output}
            status, answer = forward(url, credential, {"session_id": session_id, "token_index": position, **given})
            assert status == 200, answer
            output = answer["output"]
        position += len(ids)
        if not pending:
            generated += output["token_ids"]
            pending = output["token_ids"]
    return generated
