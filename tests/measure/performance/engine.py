"""Many streams over two stages of one core each, compared with one stage of one core; prompts and gaps."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from services.coordinator.engine.step_costs import DECODE_GAP_SECONDS
from tests.measure.performance.speed import pin_stages
from tests.measure.performance.streams import arrival_times
from tests.measure.report import TRANSFORMERS, Section, named, spread, title_of
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster, running_cluster

PAIRS = 7
PAIRS_OF_ONE_STREAM = 15  # each takes seconds, and the compared values differ little
SESSIONS = (8, 16, 32)
NEW_TOKENS = 40
PROMPT_TOKENS = 16
LONG_PROMPT_TOKENS = 2000
TURNS = 10
TURN_TOKENS = 40


def measure(executor: str = TRANSFORMERS) -> Section:
    """Measure both clusters in turn, in float32 with this executor; both run at the same time."""
    section = Section(named("engine", executor), title_of("Many streams at once", executor))
    variables = {"NOODLE_EXECUTOR": executor}
    cores = sorted(os.sched_getaffinity(0))[:2]
    folder = real_model_folder()
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(Path(scratch) / "one", folder, 1, **variables) as one,
        running_cluster(Path(scratch) / "two", folder, 2, **variables) as two,
    ):
        pin_stages(one, cores[:1])
        pin_stages(two, cores)
        many_streams(section, one, two)
        long_prompts(section, one, two)
        chat(section, two)
    return section


def many_streams(section: Section, one: Cluster, two: Cluster) -> None:
    """Measure tokens per second against the best that two such machines can do."""
    section.say(
        f"SmolLM2-135M-Instruct, float32; {NEW_TOKENS} new tokens after {PROMPT_TOKENS}, counted while all streams "
        f"decode; {PAIRS} rounds in turn. t(n): seconds of a decode step of n sessions on one stage of one core with "
        "all layers. Best: n / t(n/2), two steps on their way, or n / t(n) where that is more. Two: tokens/s of two "
        "stages of one core."
    )
    rows = []
    for sessions in SESSIONS:
        for cluster in (one, two):  # the coordinator learns the costs of this many
            decode_rate(cluster, sessions)
        halves, wholes, rates, shares = [], [], [], []
        for _ in range(PAIRS):
            halves.append(sessions / 2 / decode_rate(one, sessions // 2))
            wholes.append(sessions / decode_rate(one, sessions))
            rates.append(decode_rate(two, sessions))
            shares.append(rates[-1] / max(sessions / halves[-1], sessions / wholes[-1]))
        rows.append(
            [sessions, f"{statistics.median(halves) * 1e3:.1f}", f"{statistics.median(wholes) * 1e3:.1f}",
             spread(rates, 1), spread(shares)]
        )  # fmt: skip
    section.table(["n", "t(n/2), ms", "t(n), ms", "two, tokens/s", "of the best"], rows)
    ratios = [decode_rate(two, 8) / decode_rate(two, 1) for _ in range(PAIRS)]
    section.say(f"8 streams against 1 over two stages: {spread(ratios)} times the tokens/s.")
    section.say()
    ratios = [decode_rate(two, 1) / decode_rate(one, 1) for _ in range(PAIRS_OF_ONE_STREAM)]
    section.say(f"One stream over two stages against one stage: {spread(ratios)}, of {len(ratios)} pairs.")
    section.say()


def long_prompts(section: Section, one: Cluster, two: Cluster) -> None:
    """Measure a prompt of 2,000 tokens and its effect on running streams."""
    ratios = []
    for number in range(PAIRS + 1):
        ids = prompt_ids(LONG_PROMPT_TOKENS, number)
        ratios.append(whole_seconds(one, ids, 1) / whole_seconds(two, ids, 1))
    section.say(f"Prefill of {LONG_PROMPT_TOKENS} tokens, two stages against one: {spread(ratios[1:])} times as fast.")
    section.say()
    gaps: list[float] = []
    chunks: list[float] = []
    for number in range(3):
        ids = prompt_ids(LONG_PROMPT_TOKENS, 100 + number)
        gaps.append(longest_gap(two, lambda ids=ids: chunks.append(chunk_seconds(two, ids))))
    usual = [longest_gap(two, lambda: time.sleep(2.0)) for _ in range(3)]
    section.say(
        f"Longest gap between tokens of 4 running streams: {max(usual) * 1e3:.0f} ms as usual, "
        f"{max(gaps) * 1e3:.0f} ms while a prompt of {LONG_PROMPT_TOKENS} tokens is prefilled (worst of 3). One of its "
        f"chunks is cut to take {DECODE_GAP_SECONDS} s on both stages together, which the token behind it waits for; "
        f"from its sending to its result it took {statistics.mean(chunks) * 1e3:.0f} ms in the mean."
    )
    section.say()


def chat(section: Section, two: Cluster) -> None:
    """Measure a chat in which each turn's prompt contains all previous turns."""
    seconds = {"with": [], "without": []}
    for way, times in seconds.items():
        ids = prompt_ids(100, 7 if way == "with" else 8)
        for turn in range(TURNS):
            asked = ids if way == "with" else [ids[0] + 1 + turn, *ids[1:]]  # another beginning shares no prefix
            times.append(whole_seconds(two, asked, 1))
            ids = [*ids, *prompt_ids(TURN_TOKENS, 200 + turn)]
    section.say(
        f"A chat of {TURNS} turns of {TURN_TOKENS} tokens after 100: time to the first token of the last turn "
        f"{seconds['with'][-1] * 1e3:.0f} ms, {seconds['without'][-1] * 1e3:.0f} ms where no prompt begins like "
        "another."
    )


def prompt_ids(count: int, number: int) -> list[int]:
    """Return token ids; the first differs for each `number`, so no prefix is shared."""
    return [1000 + number, *(1000 + (number * 7919 + index * 31) % 40_000 for index in range(count - 1))]


def whole_seconds(cluster: Cluster, ids: list[int], new_tokens: int) -> float:
    """Return the seconds of one whole request."""
    start = time.monotonic()
    cluster.generate(ids, max_new_tokens=new_tokens, ignore_eos=True)
    return time.monotonic() - start


def chunk_seconds(cluster: Cluster, ids: list[int]) -> float:
    """Return the mean seconds of a step with a chunk of this prompt, from sending to result."""
    names = [f'noodle_step_seconds_{kind}{{kind="prefill"}}' for kind in ("sum", "count")]
    before = [cluster.metric(cluster.port, name) for name in names]
    whole_seconds(cluster, ids, 1)
    seconds, count = (cluster.metric(cluster.port, name) - was for name, was in zip(names, before, strict=True))
    return seconds / count


def decode_rate(cluster: Cluster, streams: int, new_tokens: int = NEW_TOKENS) -> float:
    """Return tokens per second of all streams while all of them run."""
    arrivals = streams_of(cluster, streams, new_tokens)
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(begin < at <= end for times in arrivals for at in times) / (end - begin)


def streams_of(cluster: Cluster, streams: int, new_tokens: int) -> list[list[float]]:
    """Return the arrival times of the tokens of `streams` streams with fixed prompts."""
    return arrival_times(cluster, [prompt_ids(PROMPT_TOKENS, 300 + index) for index in range(streams)], new_tokens)


def longest_gap(cluster: Cluster, meanwhile: Callable[[], object]) -> float:
    """Return the longest gap between two tokens of any of four streams, while `meanwhile` runs."""
    thread = threading.Timer(1.5, meanwhile)
    thread.start()
    arrivals = streams_of(cluster, 4, 120)
    thread.join()
    return max(right - left for times in arrivals for left, right in itertools.pairwise(times[5:]))
