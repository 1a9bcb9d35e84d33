"""Machine B fetches its layers of a person's file over a slow link that is cut once.

`python -m tests.measure slow-link=FILE`: FILE is a GGUF.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from noodle.model.gguf import read_gguf
from tests.measure.report import Section
from tests.support.network.relay import Relay
from tests.support.processes.cluster import request, wait_until
from tests.support.processes.two_machines import TwoMachines, two_machines

BYTES_PER_SECOND = 100e6 / 8
CUT_AT_SHARE = 0.2  # of the file
READY_SECONDS = 1800.0


def measure(asked: str = "") -> Section:
    """Measure the seconds from the first fetched tensor until B's layers are ready."""
    path = Path(asked)
    if not path.is_file():
        raise SystemExit("No file: python -m tests.measure slow-link=FILE")
    relays: list[Relay] = []

    @contextlib.contextmanager
    def link(port: int) -> Iterator[Relay]:
        with Relay(port) as relay:
            relay.bytes_per_second = BYTES_PER_SECOND
            relays.append(relay)
            yield relay

    layers = int(read_gguf(path).metadata[f"{read_gguf(path).architecture}.block_count"])
    options = {
        "NOODLE_QUALITY": "stored",
        "NOODLE_THREADS": "0",
        "NOODLE_SPLIT": f"{layers - layers // 2},{layers // 2}",
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        two_machines(Path(scratch) / "run", path, link=link, is_ready=False, **options) as machines,
    ):
        wait_until(lambda: "fetching" in state_of_b(machines)["detail"], READY_SECONDS, "B fetches")
        began, before = time.monotonic(), relays[0].passed_bytes
        cut_at = CUT_AT_SHARE * path.stat().st_size
        wait_until(lambda: relays[0].passed_bytes > cut_at, READY_SECONDS, "the cut is due")
        shown = state_of_b(machines)["detail"]
        relays[0].cut()
        wait_until(lambda: state_of_b(machines)["phase"] == "ready", READY_SECONDS, "B is ready")
        seconds, passed = time.monotonic() - began, relays[0].passed_bytes - before
        weight_bytes = state_of_b(machines)["weight_bytes"]
        wait_until(machines.is_ready, READY_SECONDS, "all are ready")
        machines.generate("The capital of France is", max_new_tokens=1)
    section = Section("slow-link", "Layers over a slow link")
    section.say(
        f"{path.name}: B fetches half of the layers and the head from A over a relay of "
        f"{BYTES_PER_SECOND / 1e6:.1f} MB/s, which cuts every connection once after {cut_at / 1e6:.0f} MB. B's tensors "
        f"have {weight_bytes / 1e6:.0f} MB, {weight_bytes / BYTES_PER_SECOND:.1f} s of the link; {passed / 1e6:.0f} MB "
        f"passed. From the first tensor until the layers were ready: **{seconds:.1f} s**, "
        f"{seconds * BYTES_PER_SECOND / weight_bytes:.2f} times that. Before the cut B's /health said: {shown}."
    )
    return section


def state_of_b(machines: TwoMachines) -> dict[str, Any]:
    """Return the state of B's stage; one without details while it does not answer."""
    try:
        answer = request(machines.stage_ports[1], "GET", "/health", token=machines.token)[1]
    except OSError:
        answer = {}
    return {"detail": "", "phase": "", **answer.get("state", {})}
