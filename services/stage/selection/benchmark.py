"""Measures the seconds of a layer and of the head of a model that transformers computes, and keeps them in a file.

Stages on one machine measure one after another; later ones use the kept numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from noodle.errors import StartError
from noodle.folders import not_writable, write_atomically, writing
from noodle.wire.messages import SamplingParameters
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from services.stage.executors.candidate import Candidate
from services.stage.executors.hidden_states import encode
from services.stage.executors.load import load_by
from services.stage.selection.layer_costs import LayerSeconds
from services.stage.worker.sampler import sample

log = logging.getLogger(__name__)

FILE_NAME = "measurements.json"
LOCK_TIMEOUT_SECONDS = 300.0  # several other stages may measure before this one
LOCK_POLL_SECONDS = 0.1
CONTEXT_TOKENS = 128  # rows that a decode token attends to, and tokens of a prefill chunk
FURTHER_LAYERS = 2  # beyond the one that every slice has
BATCHED_SESSIONS = 4  # that share a batched step
MINIMUM_ROUNDS = 3
MAXIMUM_ROUNDS = 15
BUDGET_SECONDS = 1.0  # for the rounds of each kind of step beyond the minimum
CACHE_BYTES = 128 << 20  # written before a step, so that layers are read from memory and not from the processor's cache
SAMPLING = SamplingParameters(temperature=0.8, top_p=0.95)

MeasureProgress = Callable[[float, str], None]
KeptT = TypeVar("KeptT")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementKey:
    """What a measurement is valid for; a change of any field means a new measurement."""

    model_digest: str
    device: str
    device_name: str
    candidate: Candidate
    executor_version: str
    threads: int
    noodle_version: str

    def __str__(self) -> str:
        machine = (self.model_digest, self.device, self.device_name)
        formats = (self.candidate.weights, self.candidate.kv_dtype, self.candidate.dtype)
        executor = (self.candidate.executor, self.executor_version, *formats)
        return " | ".join(map(str, (*machine, *executor, self.threads, self.noodle_version)))


def measure_machine(
    folder: Path,
    layer_count: int,
    context_length: int,
    *,
    key: MeasurementKey,
    cache_dir: Path,
    progress: MeasureProgress,
) -> LayerSeconds:
    """This machine's numbers for the model in `folder`, kept in `cache_dir` or measured now, which takes a few seconds.

    `progress` receives the share done, 0 to 1, and a description. Raises NotWritable if the folder does not exist and
    cannot be made. A result that cannot be kept is measured again at each start.
    """
    path = cache_dir / FILE_NAME
    with one_at_a_time(cache_dir, progress):
        known = read_kept(path, str(key), LayerSeconds)
        if known is not None and known.is_plausible:
            progress(1.0, "measured before")
            return known
        measured = _measure(folder, layer_count, context_length, key, progress)
        keep(path, str(key), measured)
    progress(1.0, "measured")
    return measured


def _measure(
    folder: Path, layer_count: int, context_length: int, key: MeasurementKey, progress: MeasureProgress
) -> LayerSeconds:
    """Measure what further layers add to a step of one layer, which leaves out the costs of the step itself.

    Layers and head are timed in turn: under other load a machine may be half as fast in one second as in the next, and
    the ratio of layers to head decides where the model is cut.
    """
    further = min(FURTHER_LAYERS, layer_count - 1)
    start = (layer_count - 1 - further) // 2

    load = partial(
        load_by,
        key.candidate,
        folder,
        device=key.device,
        threads=key.threads,
        context_length=context_length,
        cache_dir=None,  # the weights may be holes that were not fetched yet: keep nothing made of them
    )

    def timer_of(first: int, end: int) -> SliceTimer:
        timer = SliceTimer(load(first, end), device=key.device, reserve_tokens=CONTEXT_TOKENS + 1)
        # warms up, and computes the rows that decode attends to
        timer.step_seconds(BATCHED_SESSIONS, CONTEXT_TOKENS, first_position=0)
        return timer

    def decode_of(timer: SliceTimer, sessions: int, *, sampled: bool = False) -> Callable[[], float]:
        return partial(timer.step_seconds, sessions, 1, first_position=CONTEXT_TOKENS, sampled=sampled)

    progress(0.0, f"measuring the speed of {1 + further} layers, to divide the model")
    timers = [timer_of(layer_count - 1, layer_count)]  # the last layer, with the head
    if further:
        timers.append(timer_of(start, start + 1 + further))
    progress(0.3, "measuring the speed of layers and head, to divide the model")
    medians = _median_seconds(
        {
            "decode": [decode_of(timer, 1) for timer in timers],
            "batched": [decode_of(timer, BATCHED_SESSIONS) for timer in timers],
            "prefill": [partial(timer.step_seconds, 1, CONTEXT_TOKENS, first_position=0) for timer in timers],
            "with head": [decode_of(timers[0], sessions, sampled=True) for sessions in (1, BATCHED_SESSIONS)],
        }
    )
    head, batched_head = (
        max(sampled - without[0], 0.0)
        for sampled, without in zip(medians["with head"], (medians["decode"], medians["batched"]), strict=True)
    )
    return LayerSeconds(
        decode_layer_seconds=seconds_per_layer(medians["decode"], further),
        prefill_layer_seconds_per_token=seconds_per_layer(medians["prefill"], further) / CONTEXT_TOKENS,
        head_decode_seconds=head,
        batched_layer_seconds=seconds_per_layer(medians["batched"], further) / BATCHED_SESSIONS,
        batched_head_seconds=batched_head / BATCHED_SESSIONS,
    )


class SliceTimer:
    """Times steps of a slice of its own; sessions reserve `reserve_tokens` rows each. One thread at a time uses it."""

    def __init__(self, model_slice: ModelSlice, *, device: str, reserve_tokens: int) -> None:
        self.slice = model_slice
        self.reserve_tokens = reserve_tokens  # of new sessions
        self._random = np.random.default_rng(0)
        self._unused = np.zeros(CACHE_BYTES, np.uint8) if device == "cpu" else None

    def fill_rows(self, sessions: int, tokens: int) -> None:
        """Give sessions rows 0 to `tokens` without computing them: noise takes as long to attend to."""
        for session in range(sessions):
            self.step_seconds(1, 1, first_position=0, first_session=session)
            self.slice.fill_rows_with_noise(f"measurement {session}", tokens)

    def step_seconds(
        self,
        sessions: int,
        tokens: int,
        *,
        first_position: int,
        sampled: bool = False,
        embedded: bool = True,
        first_session: int = 0,
    ) -> float:
        """Seconds of a step with `tokens` of each session, from token ids if the slice is the first and `embedded`.

        `sampled` computes logits for the last token of each session and samples from them. Rows that exist already are
        computed again into the same place.
        """
        spans = tuple(
            Span(f"measurement {session}", first_position, tokens, self.reserve_tokens)
            for session in range(first_session, first_session + sessions)
        )
        rows = np.arange(1, sessions + 1, dtype=np.int64) * tokens - 1 if sampled else np.zeros(0, np.int64)
        if self.slice.is_first and embedded:
            ids = self._random.integers(0, self.slice.vocab_size, sessions * tokens)
            batch = PackedBatch(spans, rows, token_ids=ids)
        else:
            values = self._random.standard_normal((sessions * tokens, self.slice.hidden_size), np.float32)
            batch = PackedBatch(spans, rows, hidden_states=encode(values, self.slice.dtype))
        if self._unused is not None:
            self._unused += 1
        start_seconds = time.perf_counter()
        output = self.slice.forward(batch)
        if sampled and output.logits is not None:
            for row in output.logits:
                sample(row, SAMPLING, first_position, False)
        self.slice.synchronize()  # a last slice without requested logits has copied nothing from its card
        return time.perf_counter() - start_seconds


def seconds_per_layer(seconds: list[float], further_layers: int) -> float:
    """Seconds per layer from a step of one layer and, if the model has more, a step with further layers.

    At least half an even share of the longer step: a disturbed first step must not make layers look free.
    """
    if len(seconds) == 1:
        return seconds[0]
    return max((seconds[1] - seconds[0]) / further_layers, seconds[1] / (further_layers + 1) / 2)


def _median_seconds(kinds: Mapping[str, Sequence[Callable[[], float]]]) -> dict[str, list[float]]:
    """Median seconds of each step of each kind, taken in turn; each round computes the same rows again."""
    rounds: list[dict[str, list[float]]] = []
    end = time.monotonic() + BUDGET_SECONDS * sum(map(len, kinds.values()))
    while len(rounds) < MINIMUM_ROUNDS or (len(rounds) < MAXIMUM_ROUNDS and time.monotonic() < end):
        rounds.append({kind: [step() for step in steps] for kind, steps in kinds.items()})
    return {
        kind: [statistics.median(seconds) for seconds in zip(*(each[kind] for each in rounds), strict=True)]
        for kind in kinds
    }


@contextlib.contextmanager
def one_at_a_time(
    folder: Path, progress: MeasureProgress, timeout_seconds: float = LOCK_TIMEOUT_SECONDS
) -> Iterator[None]:
    """Hold the machine's measuring lock. It is on the folder itself, so a full or read-only folder can be locked too.

    The system releases it when the process ends.
    """
    end = time.monotonic() + timeout_seconds
    with writing(folder, "NOODLE_CACHE_DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise StartError(
                        f"another stage has been measuring this machine for {timeout_seconds:.0f} seconds "
                        f"({folder} is locked).",
                        cure="Find the stage that hangs, stop it, and start this one again.",
                    ) from error
                progress(0.0, "waiting for another stage on this machine to measure")
                threading.Event().wait(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def read_kept(path: Path, key: str, kind: type[KeptT]) -> KeptT | None:
    """A kept measurement; None if there is none or the file is damaged, since it can be measured again."""
    try:
        return msgspec.convert(_entries(path)[key], kind)
    except (KeyError, msgspec.ValidationError):
        return None


def keep(path: Path, key: str, measured: object) -> None:
    """Keep a measurement beside others; one that cannot be kept is measured again at each start."""
    kept = {**_entries(path), key: measured}
    try:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(kept)))
    except OSError as error:
        refusal = not_writable(path, "NOODLE_CACHE_DIR", error)
        log.warning("the measurement is used, but not kept: %s It is made again at each start.", refusal)


def _entries(path: Path) -> dict[str, Any]:
    """Entries of a JSON file of measurements; none if it is missing, or unreadable, which is logged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        log.warning("ignoring %s, which cannot be read: %s", path, error)
        return {}
