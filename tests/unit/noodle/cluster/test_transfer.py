from __future__ import annotations

import pytest

from noodle.cluster import transfer
from noodle.cluster.transfer import TransferClock, transfer_text

MB = 1_000_000


def test_a_transfer_says_bytes_rate_and_the_time_left() -> None:
    assert transfer_text(312 * MB, 1048 * MB, 310 * MB) == "312 of 1,048 MB, 310 MB/s, 2 s left"
    assert transfer_text(0, 7200 * MB, 2.5 * MB) == "0 of 7,200 MB, 2.5 MB/s, 48 min left"
    assert transfer_text(5 * MB, 5 * MB, 10 * MB) == "5 of 5 MB, 10 MB/s, 0 s left"


def test_an_unknown_rate_is_left_out() -> None:
    assert transfer_text(0, 100 * MB) == "0 of 100 MB"
    assert transfer_text(0, 0) == "0 of 0 MB"


def test_what_was_there_before_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now_seconds = 50.0
    monkeypatch.setattr(transfer.time, "monotonic", lambda: now_seconds)
    clock = TransferClock()
    assert clock.text(600 * MB, 1000 * MB) == "600 of 1,000 MB"
    now_seconds += 2
    assert clock.text(800 * MB, 1000 * MB) == "800 of 1,000 MB, 100 MB/s, 2 s left"
    assert clock.text(10 * MB, 50 * MB) == "10 of 50 MB"  # the next transfer begins
