"""Times one device for `noodle profile`, with slices as a stage loads them and within a budget of time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from noodle.cluster.measuring import DecodePoint, DeviceProfile, PartPoint, PrefillPoint, ThreadsProfile
from noodle.errors import GenerationFailed
from services.stage.executors.transformers.loading import load_slice
from services.stage.selection.benchmark import seconds_per_layer
from services.stage.selection.device import choose_dtype, device_name, free_memory
from services.stage.selection.slice_timing import SliceTimer
from services.stage.tools.profile_points import Extent, Point, fitting_kv_tokens, layer_points, repeated

FURTHER_LAYERS = 2  # beside the one that every slice has
LAYERS_SHARE = 0.75  # of the budget; embedding and head share the rest
KV_SHARE_OF_FREE_BYTES = 0.25  # for rows to attend to

PointT = TypeVar("PointT")


@dataclass
class _Measured:
    """What was timed with one number of threads."""

    decode: list[DecodePoint] = field(default_factory=list)
    prefill: list[PrefillPoint] = field(default_factory=list)
    embedding: list[PartPoint] = field(default_factory=list)
    head: list[PartPoint] = field(default_factory=list)


@dataclass
class DeviceProfiler:
    """`measure` does it all; what is left out goes into `notes`."""

    folder: Path
    device: str
    dtype: str
    extent: Extent
    step_tokens: int
    layer_count: int
    context_length: int
    budget_seconds: float  # beside what loading takes
    say: Callable[[float, str], None]
    notes: list[str]
    _measured: dict[int, _Measured] = field(default_factory=lambda: defaultdict(_Measured))

    def measure(self, thread_counts: Sequence[int]) -> DeviceProfile:
        """Layers, embedding and head with each number of threads; raises NoodleError when they can not be loaded."""
        chosen = choose_dtype(self.dtype, self.device, torch)
        self.dtype = chosen.value
        memory = free_memory(self.device, torch)
        layer_bytes, kv_bytes = self._measure_layers(tuple(thread_counts), memory.free_bytes)
        self._measure_embedding(thread_counts)
        self._measure_head(thread_counts)
        return DeviceProfile(
            device=self.device,
            device_name=device_name(self.device, torch),
            dtype=chosen.value,
            dtype_reason=chosen.reason,
            free_bytes=memory.free_bytes,
            free_source=memory.source,
            layer_bytes=layer_bytes,
            kv_bytes_per_token=kv_bytes,
            threads=tuple(self._of_threads(threads) for threads in thread_counts),
        )

    def _measure_layers(self, thread_counts: tuple[int, ...], free_bytes: int) -> tuple[int, int]:
        """By what further layers add to a step of one; gives a layer's bytes, and its KV bytes for a token."""
        further = min(FURTHER_LAYERS, self.layer_count - 1)
        start = (self.layer_count - 1 - further) // 2
        self.say(0.0, f"{self.device}: loading layers")
        timers = [self._timer(start, end) for end in sorted({start + 1, start + 1 + further})]
        one, most = timers[0].slice, timers[-1].slice
        rows = int(free_bytes * KV_SHARE_OF_FREE_BYTES) // (one.kv_bytes_per_token + most.kv_bytes_per_token)
        kv_tokens = fitting_kv_tokens(self.extent, self.context_length, rows)
        if len(kv_tokens) < len(self.extent.kv_tokens):
            missing = sorted(set(self.extent.kv_tokens) - set(kv_tokens))
            self._note(f"decode over {', '.join(map(str, missing))} rows, which pass the context or the memory")
        points = layer_points(self.extent, thread_counts, kv_tokens, self.context_length, self.step_tokens)
        for timer in timers:
            timer.reserve_tokens = max([*kv_tokens, *(point.length for point in points)]) + 1
            if kv_tokens:
                timer.fill_rows(max(self.extent.sessions), max(kv_tokens))

        def measure(point: Point) -> None:
            torch.set_num_threads(point.threads)
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

    def _measure_embedding(self, thread_counts: Sequence[int]) -> None:
        """By the same step of the first layer from token ids and from hidden states."""
        self.say(LAYERS_SHARE, f"{self.device}: loading the embedding")
        timer = self._timer(0, 1)
        lengths = [n for n in self.extent.part_tokens if n <= min(self.context_length, self.step_tokens)]
        timer.reserve_tokens = max(lengths)

        def measure(point: tuple[int, int]) -> None:
            threads, tokens = point
            torch.set_num_threads(threads)

            def one_round() -> tuple[float, ...]:
                with_it, without_it = (
                    timer.step_seconds(1, tokens, first_position=0, embedded=embedded) for embedded in (True, False)
                )
                return (with_it - without_it,)

            (seconds,), rounds = repeated(one_round, self.extent.maximum_rounds)
            self._measured[threads].embedding.append(PartPoint(tokens, max(seconds, 0.0), rounds))

        points = [(threads, tokens) for threads in thread_counts for tokens in lengths]
        self._within_budget(points, measure, "embedding", LAYERS_SHARE, (1 - LAYERS_SHARE) / 2)

    def _measure_head(self, thread_counts: Sequence[int]) -> None:
        """By the same step of the last layer with logits and a drawn token for each session, and with none."""
        begin = (1 + LAYERS_SHARE) / 2
        self.say(begin, f"{self.device}: loading the head")
        timer = self._timer(self.layer_count - 1, self.layer_count)

        def measure(point: tuple[int, int]) -> None:
            threads, sessions = point
            torch.set_num_threads(threads)

            def one_round() -> tuple[float, ...]:
                with_it, without_it = (
                    timer.step_seconds(sessions, 1, first_position=0, sampled=sampled) for sampled in (True, False)
                )
                return (with_it - without_it,)

            (seconds,), rounds = repeated(one_round, self.extent.maximum_rounds)
            self._measured[threads].head.append(PartPoint(sessions, max(seconds, 0.0), rounds))

        points = [(threads, sessions) for threads in thread_counts for sessions in self.extent.sessions]
        self._within_budget(points, measure, "head", begin, (1 - LAYERS_SHARE) / 2)

    def _within_budget(
        self, points: Sequence[PointT], measure: Callable[[PointT], None], name: str, begin: float, share: float
    ) -> None:
        """Measure point after point until the share of the budget is used; what is left over is noted."""
        end_seconds = time.monotonic() + self.budget_seconds * share
        failed = 0
        for done, point in enumerate(points):
            if time.monotonic() >= end_seconds:
                self._note(f"{len(points) - done} of {len(points)} measurements of {name}: the time was over")
                break
            self.say(begin + share * done / len(points), f"{self.device}: {name}, {done} of {len(points)}")
            try:
                measure(point)
            except GenerationFailed:
                failed += 1
        if failed:
            self._note(f"{failed} of {len(points)} measurements of {name}: the memory did not suffice")

    def _note(self, what: str) -> None:
        self.notes.append(f"{self.device}: left out {what}.")

    def _of_threads(self, threads: int) -> ThreadsProfile:
        measured = self._measured[threads]
        return ThreadsProfile(
            threads,
            tuple(sorted(measured.decode, key=lambda point: (point.kv_tokens, point.sessions))),
            tuple(sorted(measured.prefill, key=lambda point: (point.chunk_tokens, point.sessions))),
            tuple(measured.embedding),
            tuple(measured.head),
        )

    def _timer(self, start: int, end: int) -> SliceTimer:
        loaded = load_slice(
            self.folder, start, end, device=self.device, dtype=self.dtype, context_length=self.context_length
        )
        return SliceTimer(loaded, device=self.device, reserve_tokens=1)
