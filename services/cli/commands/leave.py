"""`noodle leave`: has a stage's layers moved to the other stages and waits until it has none."""

from __future__ import annotations

import argparse
import time

from noodle.config.environment import command_config, process_environment
from noodle.errors import ConfigurationError, NotAuthenticated, RequestTimedOut
from services.cli.client.http_client import get_json, post_json
from services.cli.client.target import find_target

LEAVE_SECONDS = 600.0  # for the other stages to load the layers; as long as a load may take
POLL_SECONDS = 0.5  # between two looks at the stage's health
ANSWER_SECONDS = 10.0  # the stage's answer to POST /leave


def leave(options: argparse.Namespace) -> int:
    """Ask the stage to leave, and wait until the active plan has no layers for it."""
    environment = process_environment()
    config = command_config(environment)
    target = find_target(config)
    is_named = bool(options.url or environment.get("NOODLE_ADVERTISE_URL"))
    if target.record is not None and target.record.stage_count > 1 and not is_named:
        raise ConfigurationError(
            f"{target.record.stage_count} stages run on this machine.",
            cure="Name the stage that leaves: --url with its address, which `noodle status` shows.",
        )
    stage_url = (options.url or config.stage_url).rstrip("/")
    try:
        answer = post_json(f"{stage_url}/leave", {}, target.token, ANSWER_SECONDS)
    except NotAuthenticated as error:
        raise NotAuthenticated(
            f"The stage at {stage_url} refuses this command's cluster token.",
            cure="Set NOODLE_CLUSTER_TOKEN or NOODLE_CLUSTER_TOKEN_FILE to its cluster's token.",
        ) from error
    name = f"Stage {answer.get('stage_id')} on {answer.get('machine')}"
    if answer.get("layers") is None:
        print(f"{name} has no layers: its machine can go.")
        return 0
    print(f"{name} is leaving: its layers move to the other stages.", flush=True)
    end = time.monotonic() + LEAVE_SECONDS
    while True:
        _, health = get_json(f"{stage_url}/health", target.token)
        state = health.get("state") or {}
        if state.get("phase") == "waiting":
            print("It has no layers any more: stop it, or restart it to take part again.")
            return 0
        if time.monotonic() > end:
            raise RequestTimedOut(
                f"{name} still has its layers after {LEAVE_SECONDS:.0f} seconds.",
                cure="`noodle status` shows what is waited for. The other stages may lack memory for the layers, or "
                "NOODLE_SPLIT fixes the cut.",
            )
        time.sleep(POLL_SECONDS)
