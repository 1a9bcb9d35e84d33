"""A container's health check: `python -m noodle.web.probe coordinator|planner|stage` requests /health.

A service that starts, waits or is ready answers 200 and is healthy. One that answers `failed` (503), or not at all, is
not. The printed line is in Docker's health log (`docker inspect`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence

from noodle.config.environment import coordinator_config, planner_config, process_environment, stage_config
from noodle.config.settings import ServiceConfig
from noodle.errors import NoodleError
from noodle.http_client import HTTP_ERRORS, reason_of, request

ANSWER_SECONDS = 4.0  # longest wait for an answer; Docker's own limit is five
ANSWER_BYTES = 1 << 20  # largest answer
HEALTHY, UNHEALTHY = 0, 1  # the exit codes that Docker knows

CONFIG_OF: dict[str, Callable[[Mapping[str, str]], ServiceConfig]] = {
    "coordinator": coordinator_config,
    "planner": planner_config,
    "stage": stage_config,
}


def probe(config: ServiceConfig) -> tuple[bool, str]:
    """Return whether the service is healthy, and its status in words."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.bind.host, config.bind.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.bind.port}/health"
    try:
        answer = request(
            "GET",
            url,
            token=config.cluster_token,
            connect_seconds=ANSWER_SECONDS,
            answer_seconds=ANSWER_SECONDS,
            maximum_bytes=ANSWER_BYTES,
        )
        health = json.loads(answer.body)
        return answer.status == 200, f"{health['status']}: {health.get('detail', '')}"
    except (*HTTP_ERRORS, ValueError, KeyError, TypeError) as error:
        return False, f"{config.bind} gives no answer: {reason_of(error)}"


def main(arguments: Sequence[str]) -> int:
    """Check the named service, with the configuration of its container; return the exit code."""
    if len(arguments) != 1 or arguments[0] not in CONFIG_OF:
        print(f"usage: python -m noodle.web.probe {'|'.join(CONFIG_OF)}", file=sys.stderr)
        return UNHEALTHY
    try:
        is_healthy, status = probe(CONFIG_OF[arguments[0]](process_environment()))
    except NoodleError as error:
        is_healthy, status = False, str(error)
    print(status)
    return HEALTHY if is_healthy else UNHEALTHY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
