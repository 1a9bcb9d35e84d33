"""A container's health check: `python -m noodle.web.probe coordinator|planner|stage` asks that service's own /health.

Loading is healthy: /health answers 200 with `starting`, `waiting` or `ready`. A service that says `failed` (503), or
says nothing, is not. What it says stands in the engine's health log (`docker inspect`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence

from noodle.config.environment import coordinator_config, planner_config, process_environment, stage_config
from noodle.config.settings import ServiceConfig
from noodle.errors import NoodleError
from noodle.http_client import HTTP_ERRORS, reason_of, request

ANSWER_SECONDS = 4.0  # the engine's own limit is five
ANSWER_BYTES = 1 << 20
HEALTHY, UNHEALTHY = 0, 1  # the exit codes that Docker knows

CONFIG_OF: dict[str, Callable[[Mapping[str, str]], ServiceConfig]] = {
    "coordinator": coordinator_config,
    "planner": planner_config,
    "stage": stage_config,
}


def probe(config: ServiceConfig) -> tuple[bool, str]:
    """Whether the service is alive and has not failed, and what it says of itself."""
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
    """Ask the service that is named, by the configuration that it has itself; gives the exit code."""
    if len(arguments) != 1 or arguments[0] not in CONFIG_OF:
        print(f"usage: python -m noodle.web.probe {'|'.join(CONFIG_OF)}", file=sys.stderr)
        return UNHEALTHY
    try:
        is_healthy, said = probe(CONFIG_OF[arguments[0]](process_environment()))
    except NoodleError as error:
        is_healthy, said = False, str(error)
    print(said)
    return HEALTHY if is_healthy else UNHEALTHY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
