"""How long open requests wait for a broken pipeline. Time is passed in.

A request ends if the pipeline broke and nothing was computed for it since, for as long as a lost stage may take to
return. The time counts from the first break, not from the newest, so that a pipeline that comes and goes ends it too.
A break while a request still waits for its place is forgotten as soon as the pipeline computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from noodle.errors import GenerationFailed
from noodle.wire.hop_client import SILENCE_SECONDS


class Recovery:
    """The requests that a break hit, until something is computed for them or their time is over."""

    def __init__(self, recovery_seconds: float) -> None:
        self._recovery_seconds = recovery_seconds
        self._broken_since: dict[str, float] = {}
        self._reason = ""
        self._computed_at = 0.0  # when the pipeline last returned a result, or got its first step after none

    def computed(self, now: float, request_ids: Iterable[str] = ()) -> None:
        """Give these requests their full time again: something was computed for them; none at a first step."""
        self._computed_at = now
        for request_id in request_ids:
            self._broken_since.pop(request_id, None)

    @property
    def is_whole(self) -> bool:
        """Whether no request waits since a break."""
        return not self._broken_since

    def broke(self, reason: str, now: float, arrived_at: Mapping[str, float], *, is_busy: bool) -> None:
        """Note a break while these requests are open; a request's older break counts.

        A frozen stage is noticed by its silence, so with steps in flight the time counts from the last result.
        """
        since = max(self._computed_at, now - SILENCE_SECONDS) if is_busy else now
        self._reason = reason.rstrip(".")
        for request_id, arrived in arrived_at.items():
            self._broken_since.setdefault(request_id, max(since, arrived))

    def forget(self, request_id: str) -> None:
        self._broken_since.pop(request_id, None)

    def out_of_time(self, now: float) -> dict[str, GenerationFailed]:
        """Return the requests that have waited too long, each with the error that ends it."""
        return {
            request_id: GenerationFailed(
                f"The pipeline broke, and nothing was computed for this request for {now - since:.0f} seconds: "
                f"{self._reason}.",
                cure="See `noodle status` and that stage's log, then send the request again. NOODLE_RECOVERY_SECONDS "
                "sets how long a stage may take to return.",
            )
            for request_id, since in self._broken_since.items()
            if now - since >= self._recovery_seconds
        }
