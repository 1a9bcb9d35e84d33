"""What the services say of themselves on /health, and how that is told in one line; asks, and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from noodle.errors import NoodleError
from services.cli.client.http_client import get_json

STATUSES = ("starting", "waiting", "ready", "failed")


@dataclass(frozen=True)
class Health:
    """One service's answer; `status` is "silent" when it gave none."""

    status: str
    detail: str = ""
    progress: float | None = None
    answer: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def warnings(self) -> list[str]:
        """What works, but less than one may think."""
        said = self.answer.get("warnings")
        return [str(warning) for warning in said] if isinstance(said, list) else []

    def text(self) -> str:
        """What it does now, for a row of progress."""
        return self.detail or self.status


def ask_health(port_or_url: int | str, token: str) -> Health:
    """What answers on a loopback port, or at a URL."""
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
