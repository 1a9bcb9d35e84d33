"""The books of open requests: how many there may be, of one client too, and when each came; any thread may look."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from noodle.errors import TooManyRequests
from services.coordinator.engine.request import Client, Generation


@dataclass(slots=True)
class OpenRequest:
    """The books of one open request."""

    generation: Generation
    client_name: str
    deadline: float | None = None  # by the monotonic clock; None is none
    arrived_at: float = field(default_factory=time.monotonic)
    tokens: int = 0
    last_token_at: float | None = None


class OpenRequests:
    """All open requests by id, those that wait and those that run."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._open: dict[str, OpenRequest] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, opened: OpenRequest, client: Client) -> None:
        """Note a new one; raises TooManyRequests when there are as many as may be, of all or of this client."""
        with self._changed:
            if len(self._open) >= self._maximum:
                raise TooManyRequests(
                    f"{len(self._open)} requests are open, which is the limit.", retry_after_seconds=2
                )
            of_client = sum(each.client_name == client.name for each in self._open.values())
            if client.maximum_open and of_client >= client.maximum_open:
                raise TooManyRequests(
                    f"{of_client} requests of this key are in progress, which is its limit.",
                    cure="Wait for one of them, or raise NOODLE_MAX_REQUESTS_PER_KEY.",
                    retry_after_seconds=1,
                )
            self._open[opened.generation.request_id] = opened

    def take_back(self, opened: OpenRequest) -> bool:
        """Note one that was open before, whatever the limits; False when it is open here."""
        with self._changed:
            return self._open.setdefault(opened.generation.request_id, opened) is opened

    def get(self, request_id: str) -> OpenRequest | None:
        """The books of one, None when it has ended."""
        return self._open.get(request_id)

    def pop(self, request_id: str) -> OpenRequest | None:
        """Close the books of one; None when they are closed."""
        with self._changed:
            found = self._open.pop(request_id, None)
            self._changed.notify_all()
            return found

    def all(self) -> list[tuple[str, OpenRequest]]:
        """What is open now."""
        with self._changed:
            return list(self._open.items())

    def wait_until_none(self, seconds: float) -> None:
        """Return when all have ended or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, seconds)
