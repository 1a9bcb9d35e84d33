"""What the model store says while someone waits for it; knows nothing of who shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

REPORT_INTERVAL_SECONDS = 0.2

Activity = Literal["download", "convert", "wait"]


class Progress(msgspec.Struct, frozen=True):
    """What is being done, and how far it is; a total of 0 is unknown."""

    activity: Activity
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
    """`report` at most every REPORT_INTERVAL_SECONDS, but always at the end."""
    last_seconds = float("-inf")

    def limited(progress: Progress) -> None:
        nonlocal last_seconds
        now = time.monotonic()
        if progress.bytes_done == progress.bytes_total or now - last_seconds >= REPORT_INTERVAL_SECONDS:
            last_seconds = now
            report(progress)

    return limited
