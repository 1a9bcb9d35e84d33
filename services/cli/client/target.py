"""Which coordinator a command talks to, and with what key; sends nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from noodle.config.settings import CommandConfig
from services.cli.local.run_state import RunFolder, RunRecord, run_folder_path, running


@dataclass(frozen=True)
class Target:
    """A coordinator. `credential` opens /v1 and /generate, `token` what only the cluster may see; both may be empty."""

    url: str
    credential: str = field(repr=False)
    token: str = field(repr=False)
    record: RunRecord | None  # of the `noodle up` of this machine, when it is the one


def find_target(config: CommandConfig, url: str | None, key: str | None) -> Target:
    """The given URL, else the `noodle up` that runs here, else NOODLE_COORDINATOR_URL.

    The token of the running `noodle up` is used for its own URL only.
    """
    record = running(config.state_dir)
    chosen_url = (url or (record.coordinator_url if record else config.coordinator_url)).rstrip("/")
    token = config.cluster_token
    if record is None or chosen_url != record.coordinator_url:
        return Target(chosen_url, key or config.api_key or token, token, None)
    token = _token_of(config) or token
    return Target(chosen_url, key or config.api_key or token, token, record)


def _token_of(config: CommandConfig) -> str:
    path = RunFolder(run_folder_path(config.state_dir)).token_path
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # it is only just starting, or stopping
        return ""
