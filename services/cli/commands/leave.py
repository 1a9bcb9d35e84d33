"""`noodle leave`: has a stage's layers moved to the others and waits until it has none; knows the stage's routes."""

from __future__ import annotations

import time

from noodle.config.settings import CommandConfig
from noodle.errors import ConfigurationError, NotAuthenticated, RequestTimedOut
from services.cli.client.http_client import get_json, post_json
from services.cli.client.target import find_target

LEAVE_SECONDS = 600.0  # for the others to load what they get; as long as a load may take
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0


def leave(config: CommandConfig, advertise_url: str, url: str | None) -> int:
    """Ask the stage, and wait until a plan without it is computed by."""
    target = find_target(config, None, None)
    if target.record is not None and target.record.stage_count > 1 and not (url or advertise_url):
        raise ConfigurationError(
            f"{target.record.stage_count} stages run on this machine.",
            cure="Say which one is to leave: --url with its address, which `noodle status` shows.",
        )
    stage_url = (url or config.stage_url).rstrip("/")
    try:
        answer = post_json(f"{stage_url}/leave", {}, target.token, ANSWER_SECONDS)
    except NotAuthenticated as error:
        raise NotAuthenticated(
            f"The stage at {stage_url} refuses this command's cluster token.",
            cure="Set NOODLE_CLUSTER_TOKEN, or NOODLE_CLUSTER_TOKEN_FILE, to that of its cluster.",
        ) from error
    who = f"Stage {answer.get('stage_id')} on {answer.get('machine')}"
    if answer.get("layers") is None:
        print(f"{who} has no layers: its machine may go.")
        return 0
    print(f"{who} leaves: its layers go to the others.", flush=True)
    end = time.monotonic() + LEAVE_SECONDS
    while True:
        _, health = get_json(f"{stage_url}/health", target.token)
        state = health.get("state") or {}
        if state.get("phase") == "waiting":
            print("It has no layers any more: stop it, or restart it to take part again.")
            return 0
        if time.monotonic() > end:
            raise RequestTimedOut(
                f"{who} still has its layers after {LEAVE_SECONDS:.0f} seconds.",
                cure="`noodle status` says what is waited for; the others may have no room for them.",
            )
        time.sleep(POLL_SECONDS)
