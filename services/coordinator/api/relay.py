"""One HTTP request from the coordinator to a stage or the planner; knows connections and bounds, not what is said."""

from __future__ import annotations

from collections.abc import Mapping

from noodle.errors import GenerationFailed, NotReady, RequestTimedOut
from noodle.http_client import HTTP_ERRORS, Answer, AnswerTooLarge, reason_of, request

CONNECT_SECONDS = 3.0
MAXIMUM_RELAYED_BYTES = 64 << 20  # of an answer


def relay(
    who: str, url: str, path: str, body: bytes, headers: Mapping[str, str], token: str, *, answer_seconds: float
) -> Answer:
    """POST `body` with the cluster token; `who` names the other service in errors.

    Raises NotReady when it is not there, RequestTimedOut, and GenerationFailed when it refuses our token: that is not
    the client's to cure.
    """
    try:
        answer = request(
            "POST",
            f"{url}{path}",
            token=token,
            body=body,
            headers=headers,
            connect_seconds=CONNECT_SECONDS,
            answer_seconds=answer_seconds,
            maximum_bytes=MAXIMUM_RELAYED_BYTES,
        )
    except AnswerTooLarge as error:
        raise GenerationFailed(f"{who} at {url} answered with {error}.") from error
    except TimeoutError as error:
        raise RequestTimedOut(
            f"{who} at {url} did not answer in {answer_seconds:.0f} s.", cure="See its /health and log."
        ) from error
    except HTTP_ERRORS as error:
        raise NotReady(
            f"{who} at {url} cannot be reached: {reason_of(error)}.",
            cure="Check that it runs and that its address and port are reachable from here.",
            retry_after_seconds=2,
        ) from error
    if answer.status == 401:
        raise GenerationFailed(
            f"{who} at {url} refuses this coordinator's cluster token.",
            cure="Set the same NOODLE_CLUSTER_TOKEN on every machine.",
        )
    return answer
