"""Which coordinator a command talks to, and with which key."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from noodle.config.settings import CommandConfig
from services.cli.client.run_record import TOKEN_NAME, RunRecord, run_folder_path, running


@dataclass(frozen=True)
class Target:
    """A coordinator. `credential` is for /v1 and /generate, `token` for routes of the cluster; both may be empty."""

    url: str
    credential: str = field(repr=False)
    token: str = field(repr=False)
    record: RunRecord | None  # of this machine's `noodle up`, if that is the target


def find_target(config: CommandConfig, url: str | None = None, key: str | None = None) -> Target:
    """Return the given URL, else the `noodle up` that runs here, else NOODLE_COORDINATOR_URL.

    The token of the running `noodle up` is used for its own URL only.
    """
    record = running(config.state_dir)
    chosen_url = (url or (record.coordinator_url if record else config.coordinator_url)).rstrip("/")
    token = config.cluster_token
    if record is not None and chosen_url != record.coordinator_url:
        record = None
    if record is not None:
        with contextlib.suppress(FileNotFoundError):  # `noodle up` is just starting or stopping
            token = (run_folder_path(config.state_dir) / TOKEN_NAME).read_text(encoding="utf-8").strip() or token
    return Target(chosen_url, key or config.api_key or token, token, record)
