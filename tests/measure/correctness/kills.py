"""Kills every process many times: each request must end with the tokens of the undisturbed run."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.measure.report import TRANSFORMERS, Section, named, title_of
from tests.support.clients.kill_runs import (
    KINDS,
    NEW_TOKENS,
    SERVICES_OF,
    STREAMS,
    Stream,
    killer,
    longest_silence,
    processes_of,
    random_moment,
    run_streams,
)
from tests.support.models.equality import TIE_GAP, first_difference
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import Cluster, Services, wait_until
from tests.support.processes.stage_rig import running_coordinator, running_stages

TIMES = 10  # of each kind
EMPTY_SECONDS = 60.0
LAYERS = (15, 15)


def measure(asked: str = TRANSFORMERS) -> Section:
    """Measure; failures are reported in the section, though none is expected.

    `asked` is an executor, optionally followed by a comma and the number of kills of each kind.
    """
    executor, _, wanted_times = asked.partition(",")
    times = int(wanted_times or TIMES)
    section = Section(named("kills", asked), title_of("Everything dies", executor))
    section.say(
        f"SmolLM2-135M-Instruct, {executor}, float32, two stages of one thread on two shared cores, {STREAMS} streams "
        f"at once, half greedy and half drawn with a seed, {NEW_TOKENS} tokens each; `kill -9` at a random moment, "
        f"{times} times of each kind. Clients come back for the rest of their streams. Equal: the tokens of the "
        f"undisturbed run; tied: the first other token stands where the two best logits are closer than {TIE_GAP:g}. "
        "Held: the most KV bytes that stages hold after a run beyond what is kept for prefixes. The times are from the "
        "death to each stream's next token."
    )
    chance = random.Random(7)
    rows: list[list[object]] = []
    whole = WholeModel(real_model_folder())
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch) / "s", real_model_folder(), 2, NOODLE_EXECUTOR=executor).start()
        try:
            expected = [stream.tokens for stream in run_streams(cluster, "undisturbed", None)]
            processes = len(processes_of(cluster))
            for kind in (*SERVICES_OF, "valkey, then the coordinator"):
                name = kind.replace(" ", "-").replace(",", "")
                runs = [one_run(cluster, f"{name}-{number}", killer(cluster, kind), chance) for number in range(times)]
                rows.append(row_of(section, kind, runs, expected, whole))
            wait_until(cluster.is_ready, EMPTY_SECONDS, "it is whole again")
            processes_after = len(processes_of(cluster))
        finally:
            cluster.stop()
        left = len(processes_of(cluster))
    rows.append(row_of(section, KINDS[-1], link_runs(chance, executor, times), expected, whole))
    section.table(
        ["killed", "requests", "ended", "equal", "tied", "held", "median s to the next token", "95th", "worst"], rows
    )
    section.say(
        f"Processes of the cluster: {processes} before, {processes_after} after all kills, {left} after `noodle up` "
        "was told to stop."
    )
    return section


@dataclass
class Run:
    """One kill: all streams, its time, and the KV bytes left after it."""

    streams: list[Stream]
    died_at: float
    held_bytes: int


def one_run(services: Services, run: str, kill: Callable[[], None], chance: random.Random) -> Run:
    """Run all streams and call `kill` at a random moment."""
    died_at = 0.0

    def kill_now() -> None:
        nonlocal died_at
        kill()
        died_at = time.monotonic()

    wait_until(services.is_ready, EMPTY_SECONDS, "it is whole again")
    streams = run_streams(services, run, kill_now, random_moment(chance))
    held_bytes = 0
    try:
        wait_until(services.is_empty, EMPTY_SECONDS, "only kept KV rows are left")
    except AssertionError:
        held_bytes = services.kv_bytes_held()
    return Run(streams, died_at, held_bytes)


def link_runs(chance: random.Random, executor: str, times: int) -> list[Run]:
    """Cut all connections into stage 1 during each run."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_stages(
            Path(scratch),
            real_model_folder(),
            LAYERS,
            relayed=(1,),
            computed=computed_by(executor),
            NOODLE_TRANSPORT="auto",
        ) as rig,
        running_coordinator(rig, Path(scratch)) as services,
    ):
        return [one_run(services, f"link-{number}", rig.relays[1].cut, chance) for number in range(times)]


def computed_by(executor: str) -> tuple[dict[str, str], ...]:
    """Return the computing of each stage for a plan: float32 throughout."""
    return ({"executor": executor, "weights": "f32", "kv_dtype": "f32"},) * len(LAYERS)


def row_of(section: Section, kind: str, runs: list[Run], expected: list[list[int]], whole: WholeModel) -> list[object]:
    """Return one row of the table; report every request that failed or differs."""
    equal = tied = ended = count = 0
    silences = []
    for number, run in enumerate(runs):
        for stream, tokens in zip(run.streams, expected, strict=True):
            count += 1
            silences.append(longest_silence(stream, run.died_at))
            if stream.failure:
                section.say(f"Failed, {kind}, {number}: {stream.request_id}: {stream.failure}")
                continue
            ended += 1
            parted_at = first_difference(tokens, stream.tokens)
            if parted_at is None:
                equal += 1
            elif "seed" not in stream.body["parameters"] and is_tied(whole, stream, tokens, parted_at):
                tied += 1
            else:
                section.say(f"Differs, {kind}, {number}: {stream.request_id} from token {parted_at} on")
    held_bytes = max(run.held_bytes for run in runs)
    silences = sorted(silence for silence in silences if silence) or [0.0]
    times = (statistics.median(silences), silences[int(0.95 * (len(silences) - 1))], silences[-1])
    row: list[object] = [kind, count, ended, equal, tied, held_bytes, *(f"{seconds:.1f}" for seconds in times)]
    print(*row, flush=True)
    return row


def is_tied(whole: WholeModel, stream: Stream, tokens: list[int], parted_at: int) -> bool:
    """Return whether the two best logits are tied where a stream diverges from the expected tokens."""
    before = [*whole.tokenizer(stream.body["inputs"]).input_ids, *tokens[:parted_at]]
    return whole.best_two_gap(before) < TIE_GAP
