"""A container's health check: `python -m noodle.web.probe coordinator|planner|stage` asks that service's own /health.

Loading is healthy: /health answers 200 with `starting`, `waiting` or `ready`. A service that says `failed` (503), or
says nothing, is not. What it says stands in the engine's health log (`docker inspect`).
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Mapping, Sequence

from noodle.config.environment import coordinator_config, planner_config, process_environment, stage_config
from noodle.config.settings import ServiceConfig
from noodle.errors import NoodleError

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
    connection = http.client.HTTPConnection(host, config.bind.port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {config.cluster_token}"})
        response = connection.getresponse()
        said = json.loads(response.read(ANSWER_BYTES))
        return response.status == 200, f"{said['status']}: {said.get('detail', '')}"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        return False, f"{config.bind} gives no answer: {error or type(error).__name__}"
    finally:
        connection.close()


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
