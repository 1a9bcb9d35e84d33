"""How far a transfer of bytes is, in words: loading, fetching, downloading."""

from __future__ import annotations

import time

RATED_AFTER_SECONDS = 0.5  # of a transfer; a rate over less says little


def transfer_text(done_bytes: int, total_bytes: int, bytes_per_second: float = 0.0) -> str:
    """Return, for example, "312 of 1,048 MB, 310 MB/s, 3 s left"; a rate of 0 is unknown and left out."""
    text = f"{done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB"
    if bytes_per_second <= 0:
        return text
    rate = bytes_per_second / 1e6
    seconds = round(max(0, total_bytes - done_bytes) / bytes_per_second)
    left = f"{seconds} s" if seconds < 100 else f"{round(seconds / 60)} min"
    return f"{text}, {rate:,.{1 if rate < 10 else 0}f} MB/s, {left} left"


class TransferClock:
    """Times one transfer after another: a new total, or fewer bytes than before, begins a new one."""

    def __init__(self) -> None:
        self._done_bytes = self._total_bytes = self._first_bytes = 0
        self._first_seconds = 0.0

    def text(self, done_bytes: int, total_bytes: int) -> str:
        """Note how far it is now, and return it in words; what was done at the first call does not count as speed."""
        now = time.monotonic()
        if total_bytes != self._total_bytes or done_bytes < self._done_bytes:
            self._total_bytes, self._first_bytes, self._first_seconds = total_bytes, done_bytes, now
        self._done_bytes = done_bytes
        elapsed = now - self._first_seconds
        rate = (done_bytes - self._first_bytes) / elapsed if elapsed >= RATED_AFTER_SECONDS else 0.0
        return transfer_text(done_bytes, total_bytes, rate)
