"""`python -m tests.measure [name ...]`: runs the measurements and writes their sections into docs/measurements.md.

`equality=ggml`, `kills=ggml`, `memory=ggml`, `engine=ggml` and `side-by-side=ggml` compute with ggml; `kills=ggml,3`
makes 3 kills of each kind; `soak=3` runs for 3 minutes instead of 15; `costs=FILE,FILE` names models; `peers=FOLDER`
names the folder of llama.cpp's programs, `files=FOLDER,FILE` that and a GGUF file, `checkout=FOLDER` another checkout;
these three run only when named. Options follow the measurement that they belong to:
`kernels --instructions avx2 --rows 1,64`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.measure.correctness import costs, equality, kills, schemathesis, vocabularies
from tests.measure.endurance import load, memory, pressure, slow_link, soak
from tests.measure.kernels import products
from tests.measure.peers import files, model
from tests.measure.performance import (
    checkouts,
    containers,
    engine,
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
    "kernels": products.measure,
    "costs": costs.measure,
    "containers": containers.measure,
}
ONLY_NAMED = {
    "peers": model.measure,
    "files": files.measure,
    "checkout": checkouts.measure,
    "slow-link": slow_link.measure,
}


@dataclass
class Asked:
    """A measurement as the command line names it."""

    name: str
    value: str
    options: dict[str, str] = field(default_factory=dict)

    def section(self) -> Section:
        """Measure."""
        measure = {**MEASUREMENTS, **ONLY_NAMED}[self.name]
        return measure(*filter(None, [self.value]), **self.options)


def main() -> int:
    """Run the named measurements, or all."""
    try:
        asked = parse(sys.argv[1:] or list(MEASUREMENTS))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for each in asked:
        each.section().write()
    return 0


def parse(words: Sequence[str]) -> list[Asked]:
    """Return the measurements that the command line names; raise ValueError for an unknown name or option."""
    asked: list[Asked] = []
    remaining = iter(words)
    for word in remaining:
        if word.startswith("--") and asked:
            takes = options_of(asked[-1].name)
            name, value = word.removeprefix("--").replace("-", "_"), next(remaining, "")
            if name not in takes or not value:
                names = ", ".join(f"--{each.replace('_', '-')} VALUE" for each in takes) or "none"
                raise ValueError(f"{asked[-1].name} takes no {word!r}, or it lacks a value; its options: {names}.")
            asked[-1].options[name] = value
            continue
        name, _, value = word.partition("=")
        if name not in {**MEASUREMENTS, **ONLY_NAMED}:
            raise ValueError(
                f"There is no measurement {name!r}; there are {', '.join({**MEASUREMENTS, **ONLY_NAMED})}."
            )
        asked.append(Asked(name, value))
    return asked


def options_of(name: str) -> list[str]:
    """Return the options of a measurement: the keywords of its function."""
    parameters = inspect.signature({**MEASUREMENTS, **ONLY_NAMED}[name]).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


if __name__ == "__main__":
    sys.exit(main())
