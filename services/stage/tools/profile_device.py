"""Times one device for `noodle profile`: the steps to time, their order and rounds, within a time budget."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from noodle.cluster.measuring import DecodePoint, DeviceProfile, PartPoint, PrefillPoint, ThreadsProfile
from noodle.errors import GenerationFailed
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by
from services.stage.selection.benchmark import FURTHER_LAYERS, MINIMUM_ROUNDS, SliceTimer, seconds_per_layer
from services.stage.selection.device import device_name, free_memory

KEY_KV_TOKENS, KEY_CHUNK_TOKENS = 128, 128  # of one session, timed first with every number of threads
POINT_SECONDS = 0.5  # of rounds for a point beyond the minimum
SLOW_SECONDS = 2.0  # a first round that takes longer remains the only one
MEASURING_SECONDS = 180.0  # for all points of all devices without loading; less than stages wait for the lock
LAYERS_SHARE = 0.75  # of the budget; embedding and head share the rest
KV_SHARE_OF_FREE_BYTES = 0.25  # for rows to attend to

PointT = TypeVar("PointT")


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The points to time, and the limits."""

    sessions: tuple[int, ...] = (1, 2, 4, 8)
    kv_tokens: tuple[int, ...] = (16, 128, 512, 1024, 2048)
    chunk_tokens: tuple[int, ...] = (16, 64, 128, 256, 512)
    part_tokens: tuple[int, ...] = (1, 8, 64, 512)  # of steps whose embedding is timed; heads are timed for `sessions`
    maximum_rounds: int = 15
    measuring_seconds: float = MEASURING_SECONDS


FULL = Extent()
QUICK = Extent(
    sessions=(1, 4),
    kv_tokens=(128, 1024),
    chunk_tokens=(16, 128),
    part_tokens=(1, 64),
    maximum_rounds=5,
    measuring_seconds=30.0,
)


@dataclass(frozen=True)
class Point:
    """A step to time; `length` is each session's KV tokens in a decode, or its chunk's tokens in a prefill."""

    threads: int
    kind: Literal["decode", "prefill"]
    sessions: int
    length: int


@dataclass
class _Measured:
    """The results for one number of threads."""

    decode: list[DecodePoint] = field(default_factory=list)
    prefill: list[PrefillPoint] = field(default_factory=list)
    embedding: list[PartPoint] = field(default_factory=list)
    head: list[PartPoint] = field(default_factory=list)


@dataclass(kw_only=True)
class DeviceProfiler:
    """Times one device by `measure`; what is left out goes into `notes`."""

    folder: Path
    device: str
    candidate: Candidate
    reason: str
    extent: Extent
    step_tokens: int
    layer_count: int
    context_length: int
    budget_seconds: float  # without loading
    progress: Callable[[float, str], None]
    notes: list[str]
    _threads: int = 1  # the most that are measured
    _measured: dict[int, _Measured] = field(default_factory=lambda: defaultdict(_Measured))

    def measure(self, thread_counts: Sequence[int]) -> DeviceProfile:
        """Time layers, embedding and head with each number of threads; raises NoodleError if they cannot be loaded."""
        self._threads = max(thread_counts)
        memory = free_memory(self.device, self.candidate.executor)
        layer_bytes, kv_bytes = self._measure_layers(tuple(thread_counts), memory.free_bytes)
        tokens = [count for count in self.extent.part_tokens if count <= min(self.context_length, self.step_tokens)]
        self._measure_part("embedding", thread_counts, tokens)
        self._measure_part("head", thread_counts, self.extent.sessions)
        return DeviceProfile(
            device=self.device,
            device_name=device_name(self.device, self.candidate.executor),
            dtype=str(self.candidate),
            dtype_reason=self.reason,
            free_bytes=memory.free_bytes,
            free_source=memory.source,
            layer_bytes=layer_bytes,
            kv_bytes_per_token=kv_bytes,
            threads=tuple(self._profile_of(threads) for threads in thread_counts),
        )

    def _measure_layers(self, thread_counts: tuple[int, ...], free_bytes: int) -> tuple[int, int]:
        """Time what further layers add to a step of one; returns a layer's bytes, and its KV bytes per token."""
        further = min(FURTHER_LAYERS, self.layer_count - 1)
        start = (self.layer_count - 1 - further) // 2
        self.progress(0.0, f"{self.device}: loading layers")
        timers = [self._timer(start, end) for end in sorted({start + 1, start + 1 + further})]
        one, most = timers[0].slice, timers[-1].slice
        rows = int(free_bytes * KV_SHARE_OF_FREE_BYTES) // (one.kv_bytes_per_token + most.kv_bytes_per_token)
        kv_tokens = fitting_kv_tokens(self.extent, self.context_length, rows)
        if len(kv_tokens) < len(self.extent.kv_tokens):
            missing = sorted(set(self.extent.kv_tokens) - set(kv_tokens))
            self._note(f"decode over {', '.join(map(str, missing))} rows, which exceed the context or the memory")
        points = layer_points(self.extent, thread_counts, kv_tokens, self.context_length, self.step_tokens)
        for timer in timers:
            timer.reserve_tokens = max([*kv_tokens, *(point.length for point in points)]) + 1
            if kv_tokens:
                timer.fill_rows(max(self.extent.sessions), max(kv_tokens))

        def measure(point: Point) -> None:
            for timer in timers:
                timer.slice.set_threads(point.threads)
            tokens, position = (1, point.length) if point.kind == "decode" else (point.length, 0)

            def one_round() -> tuple[float, ...]:
                return tuple(timer.step_seconds(point.sessions, tokens, first_position=position) for timer in timers)

            seconds, rounds = repeated(one_round, self.extent.maximum_rounds)
            layer_seconds = seconds_per_layer(list(seconds), further)
            measured = self._measured[point.threads]
            if point.kind == "decode":
                measured.decode.append(DecodePoint(point.sessions, point.length, layer_seconds, rounds))
            else:
                measured.prefill.append(PrefillPoint(point.sessions, point.length, layer_seconds, rounds))

        self._within_budget(points, measure, "layers", 0.0, LAYERS_SHARE)
        layer_bytes = (most.weight_bytes - one.weight_bytes) // further if further else most.weight_bytes
        return layer_bytes, one.kv_bytes_per_token

    def _measure_part(
        self, part: Literal["embedding", "head"], thread_counts: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Time the same step of the first or last layer with and without its part.

        `counts` are tokens of one session for the embedding, and sessions with one token each for the head.
        """
        is_head, share = part == "head", (1 - LAYERS_SHARE) / 2
        begin = LAYERS_SHARE + share if is_head else LAYERS_SHARE
        self.progress(begin, f"{self.device}: loading the {part}")
        timer = self._timer(self.layer_count - 1, self.layer_count) if is_head else self._timer(0, 1)
        timer.reserve_tokens = 1 if is_head else max(counts)

        def seconds_of(count: int, is_included: bool) -> float:
            options: dict[str, Any] = {"sampled" if is_head else "embedded": is_included}
            sessions, tokens = (count, 1) if is_head else (1, count)
            return timer.step_seconds(sessions, tokens, first_position=0, **options)

        def measure(point: tuple[int, int]) -> None:
            threads, count = point
            timer.slice.set_threads(threads)
            (seconds,), rounds = repeated(
                lambda: (seconds_of(count, True) - seconds_of(count, False),), self.extent.maximum_rounds
            )
            measured = self._measured[threads]
            points = measured.head if is_head else measured.embedding
            points.append(PartPoint(count, max(seconds, 0.0), rounds))

        self._within_budget(
            [(threads, count) for threads in thread_counts for count in counts], measure, part, begin, share
        )

    def _within_budget(
        self, points: Sequence[PointT], measure: Callable[[PointT], None], name: str, begin: float, share: float
    ) -> None:
        """Measure one point after another until the share of the budget is used; what is left out is noted."""
        end_seconds = time.monotonic() + self.budget_seconds * share
        failed = 0
        for done, point in enumerate(points):
            if time.monotonic() >= end_seconds:
                self._note(f"{len(points) - done} of {len(points)} measurements of {name}: the time was over")
                break
            self.progress(begin + share * done / len(points), f"{self.device}: {name}, {done} of {len(points)}")
            try:
                measure(point)
            except GenerationFailed:
                failed += 1
        if failed:
            self._note(f"{failed} of {len(points)} measurements of {name}: the memory did not suffice")

    def _note(self, what: str) -> None:
        self.notes.append(f"{self.device}: left out {what}.")

    def _profile_of(self, threads: int) -> ThreadsProfile:
        measured = self._measured[threads]
        return ThreadsProfile(
            threads,
            tuple(sorted(measured.decode, key=lambda point: (point.kv_tokens, point.sessions))),
            tuple(sorted(measured.prefill, key=lambda point: (point.chunk_tokens, point.sessions))),
            tuple(measured.embedding),
            tuple(measured.head),
        )

    def _timer(self, start: int, end: int) -> SliceTimer:
        loaded = load_by(
            self.candidate,
            self.folder,
            start,
            end,
            device=self.device,
            threads=self._threads,
            context_length=self.context_length,
            cache_dir=None,
        )
        return SliceTimer(loaded, device=self.device, reserve_tokens=1)


def thread_counts(most: int) -> tuple[int, ...]:
    """The most threads, then 1, 2, 4, ... below: the most important first."""
    return (most, *(1 << power for power in range(most.bit_length()) if 1 << power < most))


def layer_points(
    extent: Extent, counts: tuple[int, ...], kv_tokens: tuple[int, ...], context_length: int, step_tokens: int
) -> list[Point]:
    """All points of the layers, the most important first, since a lack of time cuts off the end.

    The chunks of all sessions together have at most `step_tokens`, as in a step, and none exceeds the context.
    """
    decode = [(sessions, length) for length in kv_tokens for sessions in extent.sessions]
    prefill = [
        (sessions, length)
        for length in extent.chunk_tokens
        for sessions in extent.sessions
        if length <= context_length and sessions * length <= step_tokens
    ]
    keys = {"decode": _nearest(decode, KEY_KV_TOKENS), "prefill": _nearest(prefill, KEY_CHUNK_TOKENS)}
    points = [Point(threads, "decode", *pair) for threads in counts for pair in decode]
    points += [Point(threads, "prefill", *pair) for threads in counts for pair in prefill]
    return sorted(
        points, key=lambda point: ((point.sessions, point.length) != keys[point.kind], counts.index(point.threads))
    )


def _nearest(pairs: list[tuple[int, int]], wanted: int) -> tuple[int, int] | None:
    """The pair of one session with the length nearest to `wanted`."""
    return min((pair for pair in pairs if pair[0] == 1), key=lambda pair: abs(pair[1] - wanted), default=None)


def fitting_kv_tokens(extent: Extent, context_length: int, most_rows: int) -> tuple[int, ...]:
    """The lengths that fit into the context, and into `most_rows` rows of memory for the most sessions at once."""
    most_sessions = max(extent.sessions)
    return tuple(
        length for length in extent.kv_tokens if length < context_length and most_sessions * (length + 1) <= most_rows
    )


def repeated(round_seconds: Callable[[], tuple[float, ...]], maximum_rounds: int) -> tuple[tuple[float, ...], int]:
    """Medians over the rounds, and the number of rounds: fewer if one takes long.

    The first round counts; the caller warms up.
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
