"""One HTTP request from the coordinator to a stage or the planner; knows connections and bounds, not what is said."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from noodle.errors import GenerationFailed, NotReady, RequestTimedOut

CONNECT_SECONDS = 3.0
MAXIMUM_RELAYED_BYTES = 64 << 20  # of an answer


@dataclass(frozen=True, slots=True)
class Relayed:
    """What the other service answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def relay(
    who: str, url: str, path: str, body: bytes, headers: Mapping[str, str], token: str, *, answer_seconds: float
) -> Relayed:
    """POST `body` with the cluster token; `who` names the other service in errors.

    Raises NotReady when it is not there, RequestTimedOut, and GenerationFailed when it refuses our token: that is not
    the client's to cure.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
    try:
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.settimeout(answer_seconds)
            connection.request("POST", path, body, {**headers, "Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            content = response.read(MAXIMUM_RELAYED_BYTES + 1)
            relayed = Relayed(response.status, dict(response.headers.items()), content)
    except TimeoutError as error:
        raise RequestTimedOut(
            f"{who} at {url} did not answer in {answer_seconds:.0f} s.", cure="See its /health and log."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NotReady(
            f"{who} at {url} can not be reached: {reason}.",
            cure="See that it runs, and that its address and port are reachable from here.",
            retry_after_seconds=2,
        ) from error
    if len(content) > MAXIMUM_RELAYED_BYTES:
        raise GenerationFailed(f"{who} at {url} answered more than {MAXIMUM_RELAYED_BYTES} bytes.")
    if relayed.status == 401:
        raise GenerationFailed(
            f"{who} at {url} refuses this coordinator's cluster token.",
            cure="Set the same NOODLE_CLUSTER_TOKEN on every machine.",
        )
    return relayed
