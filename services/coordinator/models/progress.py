"""Progress of the model store while it fetches or converts a model."""

from __future__ import annotations

import time
from collections.abc import Callable

from noodle.cluster.measuring import StoreProgress

REPORT_INTERVAL_SECONDS = 0.2

ReportProgress = Callable[[StoreProgress], None]


def at_intervals(report: ReportProgress) -> ReportProgress:
    """Call `report` at most every REPORT_INTERVAL_SECONDS, and always at the end."""
    last_seconds = float("-inf")

    def limited(progress: StoreProgress) -> None:
        nonlocal last_seconds
        now = time.monotonic()
        if progress.bytes_done == progress.bytes_total or now - last_seconds >= REPORT_INTERVAL_SECONDS:
            last_seconds = now
            report(progress)

    return limited
