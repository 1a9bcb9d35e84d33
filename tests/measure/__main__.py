"""`python -m tests.measure [name ...]`: runs the measurements and writes their sections into docs/measurements.md.

`equality=ggml`, `kills=ggml`, `memory=ggml`, `engine=ggml` and `side-by-side=ggml` compute with ggml; `kills=ggml,3`
makes 3 kills of each kind; `soak=3` runs for 3 minutes instead of 15; `costs=FILE,FILE` names models; `peers=FOLDER`
names the folder of llama.cpp's programs, `files=FOLDER,FILE` that and a GGUF file, `checkout=FOLDER` another checkout;
these three run only when named.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.measure.correctness import costs, equality, kills, schemathesis, vocabularies
from tests.measure.endurance import load, memory, pressure, slow_link, soak
from tests.measure.performance import (
    checkouts,
    containers,
    engine,
    files,
    kernels,
    peers,
    sampling,
    side_by_side,
    speed,
    start,
    transport,
)
from tests.measure.report import Section

MEASUREMENTS: dict[str, Callable[..., Section]] = {
    "equality": equality.measure,
    "speed": speed.measure,
    "memory": memory.measure,
    "load": load.measure,
    "sampling": sampling.measure,
    "start": start.measure,
    "transport": transport.measure,
    "schemathesis": schemathesis.measure,
    "vocabularies": vocabularies.measure,
    "kills": kills.measure,
    "soak": soak.measure,
    "tight": pressure.measure_tight,
    "overload": pressure.measure_overload,
    "engine": engine.measure,
    "side-by-side": side_by_side.measure,
    "kernels": kernels.measure,
    "costs": costs.measure,
    "containers": containers.measure,
}
ONLY_NAMED = {
    "peers": peers.measure,
    "files": files.measure,
    "checkout": checkouts.measure,
    "slow-link": slow_link.measure,
}


def main() -> int:
    """Run the named measurements, or all."""
    asked = [word.partition("=") for word in sys.argv[1:] or MEASUREMENTS]
    unknown = [name for name, _, _ in asked if name not in {**MEASUREMENTS, **ONLY_NAMED}]
    if unknown:
        print(f"There is no measurement {unknown[0]!r}; there are {', '.join(MEASUREMENTS)}.", file=sys.stderr)
        return 2
    for name, _, value in asked:
        measure = {**MEASUREMENTS, **ONLY_NAMED}[name]
        section = measure(value) if value else measure()
        section.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
