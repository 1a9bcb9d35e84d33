"""Which steps `noodle profile` times, in which order, and how often each; values in, values out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SESSIONS = (1, 2, 4, 8)
KV_TOKENS = (16, 128, 512, 1024, 2048)
CHUNK_TOKENS = (16, 64, 128, 256, 512)
PART_TOKENS = (1, 8, 64, 512)  # whose embedding is timed; heads are timed for SESSIONS
KEY_KV_TOKENS, KEY_CHUNK_TOKENS = 128, 128  # of one session: what is timed first with every number of threads
MINIMUM_ROUNDS = 3
MAXIMUM_ROUNDS = 15
POINT_SECONDS = 0.5  # of rounds for a point, once the minimum is done
SLOW_SECONDS = 2.0  # a first round that takes longer stays the only one
MEASURING_SECONDS = 180.0  # for all points of all devices, loading not counted; less than stages wait for the lock


@dataclass(frozen=True)
class Extent:
    """How much is timed."""

    sessions: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    part_tokens: tuple[int, ...]
    maximum_rounds: int
    measuring_seconds: float


FULL = Extent(SESSIONS, KV_TOKENS, CHUNK_TOKENS, PART_TOKENS, MAXIMUM_ROUNDS, MEASURING_SECONDS)
QUICK = Extent((1, 4), (128, 1024), (16, 128), (1, 64), 5, 30.0)


@dataclass(frozen=True)
class Point:
    """A step to be timed: `length` is KV tokens of a decode, tokens of a chunk of a prefill, for each session."""

    threads: int
    kind: Literal["decode", "prefill"]
    sessions: int
    length: int


def thread_counts(most: int) -> tuple[int, ...]:
    """The most, then 1, 2, 4, ... below it: what matters first comes first."""
    doubled = []
    count = 1
    while count < most:
        doubled.append(count)
        count *= 2
    return (most, *doubled)


def layer_points(
    extent: Extent, counts: tuple[int, ...], kv_tokens: tuple[int, ...], context_length: int, step_tokens: int
) -> list[Point]:
    """All points of the layers, the most telling first: what time cuts off is at the end.

    The chunks of all sessions together have at most `step_tokens`, as in a step, and none passes the context.
    """
    decode = [(sessions, length) for length in kv_tokens for sessions in extent.sessions]
    prefill = [
        (sessions, length)
        for length in extent.chunk_tokens
        for sessions in extent.sessions
        if length <= context_length and sessions * length <= step_tokens
    ]
    points = [Point(threads, "decode", *pair) for threads in counts for pair in decode]
    points += [Point(threads, "prefill", *pair) for threads in counts for pair in prefill]
    return sorted(points, key=lambda point: (not _is_key(point, decode, prefill), counts.index(point.threads)))


def fitting_kv_tokens(extent: Extent, context_length: int, most_rows: int) -> tuple[int, ...]:
    """The lengths that fit into the context, and into `most_rows` rows of memory for the most sessions at once."""
    most_sessions = max(extent.sessions)
    return tuple(
        length for length in extent.kv_tokens if length < context_length and most_sessions * (length + 1) <= most_rows
    )


def _is_key(point: Point, decode: list[tuple[int, int]], prefill: list[tuple[int, int]]) -> bool:
    """Whether this is the point of its kind by which thread counts are compared."""
    pairs, wanted = (decode, KEY_KV_TOKENS) if point.kind == "decode" else (prefill, KEY_CHUNK_TOKENS)
    return (point.sessions, point.length) == key_of(pairs, wanted)


def key_of(pairs: list[tuple[int, int]], wanted: int) -> tuple[int, int] | None:
    """Of one session, the length nearest to the wanted one."""
    alone = [pair for pair in pairs if pair[0] == 1]
    return min(alone, key=lambda pair: abs(pair[1] - wanted)) if alone else None


def repeated(round_seconds: Callable[[], tuple[float, ...]], maximum_rounds: int) -> tuple[tuple[float, ...], int]:
    """Medians of what each round gives, and how many rounds there were: fewer where one takes long.

    A warm-up is the caller's; the first round counts.
    """
    rounds: list[tuple[float, ...]] = []
    end_seconds = time.monotonic() + POINT_SECONDS
    while len(rounds) < maximum_rounds:
        rounds.append(round_seconds())
        now = time.monotonic()
        if len(rounds) == 1 and sum(rounds[0]) > SLOW_SECONDS:
            break
        if len(rounds) >= MINIMUM_ROUNDS and now >= end_seconds:
            break
    medians = tuple(statistics.median(column) for column in zip(*rounds, strict=True))
    return medians, len(rounds)
