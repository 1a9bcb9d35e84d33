"""Everything dies once, many times: every request ends with the tokens of the undisturbed run."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.measure.report import Section
from tests.support.cluster import Services, running_cluster, wait_until
from tests.support.kill_runs import (
    KINDS,
    NEW_TOKENS,
    SERVICES_OF,
    STREAMS,
    Stream,
    killer,
    longest_silence,
    random_moment,
    run_streams,
)
from tests.support.real_model import real_model_folder
from tests.support.stage_rig import running_coordinator, running_stages

TIMES = 10  # of each kind
EMPTY_SECONDS = 60.0
LAYERS = (15, 15)


def measure() -> Section:
    """Fails when a request is lost or KV rows are left; tokens that differ are counted."""
    section = Section("kills", "Everything dies")
    section.say(
        f"SmolLM2-135M-Instruct, float32, two stages of one thread on two shared cores, {STREAMS} streams at once, "
        f"half greedy and half drawn with a seed, {NEW_TOKENS} tokens each; `kill -9` at a random moment, {TIMES} "
        "times of each kind. Clients come back for the rest of their streams. Equal: the tokens of the undisturbed run."
    )
    chance = random.Random(7)
    rows: list[list[object]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(Path(scratch) / "s", real_model_folder(), 2) as cluster,
    ):
        expected = [stream.tokens for stream in run_streams(cluster, "undisturbed", None)]
        for kind in (*SERVICES_OF, "valkey, then the coordinator"):
            runs = [
                one_run(cluster, f"{kind.replace(' ', '-').replace(',', '')}-{number}", killer(cluster, kind), chance)
                for number in range(TIMES)
            ]
            rows.append(row_of(kind, runs, expected))
    rows.append(row_of(KINDS[-1], link_runs(chance), expected))
    section.table(["killed", "requests", "ended", "equal", "median s to the next token", "worst s"], rows)
    return section


def one_run(
    services: Services, run: str, kill: Callable[[], None], chance: random.Random
) -> tuple[list[Stream], float]:
    """All streams, and when it died; nothing is left behind."""
    died_at = 0.0

    def kill_now() -> None:
        nonlocal died_at
        kill()
        died_at = time.monotonic()

    wait_until(lambda: services.get("/health")[1].get("status") == "ready", EMPTY_SECONDS, "it is whole again")
    streams = run_streams(services, run, kill_now, random_moment(chance))
    wait_until(lambda: is_empty(services), EMPTY_SECONDS, "only kept KV rows are left")
    return streams, died_at


def is_empty(services: Services) -> bool:
    """Whether stages hold nothing but what is kept on purpose; false while one of them is away."""
    try:
        return services.kv_bytes_held() == 0
    except (OSError, AssertionError, KeyError):
        return False


def link_runs(chance: random.Random) -> list[tuple[list[Stream], float]]:
    """All connections into stage 1 are cut."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_stages(Path(scratch), real_model_folder(), LAYERS, relayed=(1,), NOODLE_TRANSPORT="auto") as rig,
        running_coordinator(rig, Path(scratch)) as services,
    ):
        return [one_run(services, f"link-{number}", rig.relays[1].cut, chance) for number in range(TIMES)]


def row_of(kind: str, runs: list[tuple[list[Stream], float]], expected: list[list[int]]) -> list[object]:
    """One line of the table."""
    streams = [stream for found, _ in runs for stream in found]
    failed = [stream.failure for stream in streams if stream.failure]
    assert not failed, f"{kind}: {failed}"
    equal = sum(stream.tokens == whole for found, _ in runs for stream, whole in zip(found, expected, strict=True))
    silences = [silence for found, died in runs for stream in found if (silence := longest_silence(stream, died))]
    print(kind, len(streams), equal, flush=True)
    return [kind, len(streams), len(streams), equal, f"{statistics.median(silences):.1f}", f"{max(silences):.1f}"]
