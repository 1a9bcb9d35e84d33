"""`python -m tests.measure [name ...]`: runs the measurements and writes their sections into docs/measurements.md."""

from __future__ import annotations

import sys

from tests.measure import (
    containers,
    engine,
    equality,
    kills,
    load,
    memory,
    sampling,
    schemathesis,
    speed,
    start,
    transport,
)

MEASUREMENTS = {
    "equality": equality.measure,
    "speed": speed.measure,
    "memory": memory.measure,
    "load": load.measure,
    "sampling": sampling.measure,
    "start": start.measure,
    "transport": transport.measure,
    "schemathesis": schemathesis.measure,
    "kills": kills.measure,
    "engine": engine.measure,
    "containers": containers.measure,
}


def main() -> int:
    """Run those that are named, or all."""
    names = sys.argv[1:] or list(MEASUREMENTS)
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        print(f"There is no measurement {unknown[0]!r}; there are {', '.join(MEASUREMENTS)}.", file=sys.stderr)
        return 2
    for name in names:
        MEASUREMENTS[name]().write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
