"""Progress of the model store while it fetches or converts a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

REPORT_INTERVAL_SECONDS = 0.2


class Progress(msgspec.Struct, frozen=True):
    """One report; a total of 0 is unknown."""

    activity: Literal["download", "convert", "wait"]
    detail: str
    bytes_done: int = 0
    bytes_total: int = 0

    def text(self) -> str:
        """One line for a terminal."""
        if not self.bytes_total:
            return f"{self.activity}: {self.detail}"
        percent = 100 * self.bytes_done // self.bytes_total
        return f"{self.activity}: {self.detail}, {percent} % of {self.bytes_total / 1e6:.0f} MB"


ReportProgress = Callable[[Progress], None]


def at_intervals(report: ReportProgress) -> ReportProgress:
    """Call `report` at most every REPORT_INTERVAL_SECONDS, and always at the end."""
    last_seconds = float("-inf")

    def limited(progress: Progress) -> None:
        nonlocal last_seconds
        now = time.monotonic()
        if progress.bytes_done == progress.bytes_total or now - last_seconds >= REPORT_INTERVAL_SECONDS:
            last_seconds = now
            report(progress)

    return limited
