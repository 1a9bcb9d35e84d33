"""Times several ways to do the same against one another; knows none of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence


def least_seconds(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The seconds of each way's fastest round, taken in turn: what else runs on a machine only ever adds."""
    least = [math.inf] * len(ways)
    for _ in range(rounds):
        for index, run in enumerate(ways):
            start = time.perf_counter()
            run()
            least[index] = min(least[index], time.perf_counter() - start)
    return least
