"""What a service answers on /health."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from noodle.errors import NoodleError, NotReady
from services.cli.client.http_client import get_json
from services.cli.client.target import Target

STATUSES = ("starting", "waiting", "ready", "failed")


@dataclass(frozen=True)
class Health:
    """One service's answer; `status` is "silent" if it gave none."""

    status: str
    detail: str = ""
    progress: float | None = None
    answer: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def warnings(self) -> list[str]:
        """What is degraded but working."""
        warnings = self.answer.get("warnings")
        return [str(warning) for warning in warnings] if isinstance(warnings, list) else []

    @property
    def has_chat_template(self) -> bool:
        """Whether the model answers messages; True if the coordinator does not say."""
        return self.answer.get("has_chat_template") is not False

    @property
    def stages(self) -> list[dict[str, Any]]:
        return [stage for stage in self.answer.get("stages") or [] if isinstance(stage, dict)]

    @property
    def context_length(self) -> int:
        """The context that the cluster promises, in tokens; 0 if it does not say."""
        return int(self.answer.get("context_length") or 0)

    def text(self) -> str:
        """Return what it is doing, for a row of progress."""
        return self.detail or self.status


def ask_health(port_or_url: int | str, token: str) -> Health:
    """Ask the service on a loopback port or at a URL."""
    base = f"http://127.0.0.1:{port_or_url}" if isinstance(port_or_url, int) else port_or_url
    try:
        _, answer = get_json(f"{base}/health", token)
    except NoodleError as error:
        return Health("silent", error.message)
    status = answer.get("status")
    progress = answer.get("progress")
    waiting_for = answer.get("waiting_for")
    detail = str(answer.get("detail") or "")
    if not detail and isinstance(waiting_for, list):
        detail = "waiting for " + ", ".join(map(str, waiting_for)) if waiting_for else ""
    return Health(
        status if status in STATUSES else "silent",
        detail,
        min(1.0, max(0.0, float(progress))) if isinstance(progress, int | float) else None,
        answer,
    )


def require_ready(target: Target) -> Health:
    """Return the health of a cluster that answers requests; raises NotReady."""
    health = ask_health(target.url, target.token or target.credential)
    if health.status != "ready":
        raise NotReady(f"The cluster at {target.url} is not ready: {health.text()}", cure="See `noodle status`.")
    return health
