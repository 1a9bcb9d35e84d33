"""Seconds that a layer and the head of this model take on this machine, by the real code; kept in a file.

Two stages on one machine measure one after the other, and the second finds the first's numbers.
"""

from __future__ import annotations

import fcntl
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from noodle.cluster.plan import Source
from noodle.errors import StartError
from noodle.folders import not_writable, writing
from services.stage.executors.base import ModelSlice
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by
from services.stage.selection.kept_file import read_kept, write_kept
from services.stage.selection.slice_timing import SliceTimer

log = logging.getLogger(__name__)

FILE_NAME = "measurements.json"
LOCK_TIMEOUT_SECONDS = 300.0  # several other stages may measure before this one
LOCK_POLL_SECONDS = 0.1
CONTEXT_TOKENS = 128  # rows a decode token attends to here, and tokens of a prefill chunk
FURTHER_LAYERS = 2  # beside the one that every slice has
BATCHED_SESSIONS = 4  # that share a step, where one is timed
MINIMUM_ROUNDS = 3
MAXIMUM_ROUNDS = 15
BUDGET_SECONDS = 1.0  # for the rounds of each kind of step, once the minimum is done

MeasureProgress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class MeasuredSeconds:
    """What the planner needs of a machine's speed, for one model, device and dtype."""

    decode_layer_seconds: float  # one layer, one token
    prefill_layer_seconds_per_token: float  # one layer, per token of a chunk
    head_decode_seconds: float  # head and sampling of one row
    batched_layer_seconds: float  # one layer, for each token of a step of BATCHED_SESSIONS sessions
    batched_head_seconds: float  # head and sampling, for each of its rows
    source: Source = "measured"
    layer_weight_bytes: float = 0.0  # of one layer as it is held; 0 where a model has too few layers to tell


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What the numbers hold for; another of any of these is measured again."""

    model_digest: str
    device: str
    device_name: str
    executor: str
    executor_version: str
    weights: str
    kv_dtype: str
    dtype: str
    threads: int
    noodle_version: str

    def __str__(self) -> str:
        return " | ".join(str(part) for part in asdict(self).values())

    @property
    def candidate(self) -> Candidate:
        """What computes."""
        return Candidate(self.executor, self.weights, self.kv_dtype, self.dtype)


def measure_machine(
    folder: Path,
    layer_count: int,
    context_length: int,
    key: MeasurementKey,
    cache_dir: Path,
    progress: MeasureProgress,
) -> MeasuredSeconds:
    """The numbers of this machine for the model in `folder`, from the file in `cache_dir` or measured now.

    Takes a few seconds when measured. `progress` gets the part done, 0 to 1, and what is being done.
    Raises NotWritable when there is no such folder and none can be made; where only the result can not be kept, it is
    measured anew at each start.
    """
    with writing(cache_dir, "NOODLE_CACHE_DIR"):
        cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / FILE_NAME
    with one_at_a_time(cache_dir, progress):
        kept = read_kept(path)
        known = _measurement_in(kept, str(key))
        if known is not None:
            progress(1.0, "measured before")
            return known
        measured = _measure(folder, layer_count, context_length, key, progress)
        kept[str(key)] = asdict(measured)
        try:
            write_kept(path, kept)
        except OSError as error:
            log.warning(
                "the measurement is used, but not kept: %s It is made anew at each start.",
                not_writable(path, "NOODLE_CACHE_DIR", error),
            )
    progress(1.0, "measured")
    return measured


def _measure(
    folder: Path,
    layer_count: int,
    context_length: int,
    key: MeasurementKey,
    progress: MeasureProgress,
) -> MeasuredSeconds:
    """By what further layers add to a step of one layer: what a step costs beside its layers is no layer's time.

    Layers and head are timed in turn. A machine that others disturb is half as fast in one second as in the next, and
    what layers take against the head decides where the model is cut.
    """
    further = min(FURTHER_LAYERS, layer_count - 1)
    start = (layer_count - 1 - further) // 2

    def load(first: int, end: int) -> ModelSlice:
        return load_by(
            key.candidate,
            folder,
            first,
            end,
            device=key.device,
            threads=key.threads,
            context_length=context_length,
            cache_dir=None,  # the weights may be holes that nobody has fetched yet: nothing of them is kept
        )

    def timer_of(first: int, end: int) -> SliceTimer:
        timer = SliceTimer(load(first, end), device=key.device, reserve_tokens=CONTEXT_TOKENS + 1)
        # warm-up, and the rows that decode attends to
        timer.step_seconds(BATCHED_SESSIONS, CONTEXT_TOKENS, first_position=0)
        return timer

    def decode_of(timer: SliceTimer, sessions: int, *, sampled: bool = False) -> Callable[[], float]:
        return partial(timer.step_seconds, sessions, 1, first_position=CONTEXT_TOKENS, sampled=sampled)

    progress(0.0, "measuring how large a layer is")
    one_layer_bytes = load(start, start + 1).weight_bytes
    progress(0.1, f"measuring {1 + further} of the model's layers")
    timers = [timer_of(layer_count - 1, layer_count)]  # the last layer, with the head
    if further:
        timers.append(timer_of(start, start + 1 + further))
    progress(0.3, "measuring layers and head")
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
    # a slice with the last layer has the head too
    tells = further and start + 1 + further < layer_count
    return MeasuredSeconds(
        decode_layer_seconds=seconds_per_layer(medians["decode"], further),
        prefill_layer_seconds_per_token=seconds_per_layer(medians["prefill"], further) / CONTEXT_TOKENS,
        head_decode_seconds=head,
        batched_layer_seconds=seconds_per_layer(medians["batched"], further) / BATCHED_SESSIONS,
        batched_head_seconds=batched_head / BATCHED_SESSIONS,
        layer_weight_bytes=(timers[-1].slice.weight_bytes - one_layer_bytes) / further if tells else 0.0,
    )


def seconds_per_layer(seconds: list[float], further_layers: int) -> float:
    """From a step of one layer and, where the model has more, one with further layers.

    Never less than an even share of the longer step by half: a disturbed first step must not make layers free.
    """
    if len(seconds) == 1:
        return seconds[0]
    return max((seconds[1] - seconds[0]) / further_layers, seconds[1] / (further_layers + 1) / 2)


def _median_seconds(kinds: Mapping[str, Sequence[Callable[[], float]]]) -> dict[str, list[float]]:
    """The seconds of each step of each kind, all taken in turn; their rows are computed again each time."""
    rounds: list[dict[str, list[float]]] = []
    end = time.monotonic() + BUDGET_SECONDS * sum(map(len, kinds.values()))
    while len(rounds) < MINIMUM_ROUNDS or (len(rounds) < MAXIMUM_ROUNDS and time.monotonic() < end):
        rounds.append({kind: [step() for step in steps] for kind, steps in kinds.items()})
    return {
        kind: [statistics.median(seconds) for seconds in zip(*(each[kind] for each in rounds), strict=True)]
        for kind in kinds
    }


@contextmanager
def one_at_a_time(
    folder: Path, progress: MeasureProgress, timeout_seconds: float = LOCK_TIMEOUT_SECONDS
) -> Iterator[None]:
    """Holds the machine's measuring lock, which is on the folder itself: a full or read-only one can be locked too.

    The system frees it when the process ends.
    """
    end = time.monotonic() + timeout_seconds
    with writing(folder, "NOODLE_CACHE_DIR"):
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
                        cure="Look for a stage that hangs, stop it, and start this one again.",
                    ) from error
                progress(0.0, "waiting for another stage on this machine to measure")
                threading.Event().wait(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _measurement_in(kept: dict[str, Any], key: str) -> MeasuredSeconds | None:
    entry = kept.get(key)
    if not isinstance(entry, dict):
        return None
    try:
        measured = msgspec.convert(entry, MeasuredSeconds)
    except msgspec.ValidationError:
        return None  # damaged, or written by hand: it can be measured again
    layers = (measured.decode_layer_seconds, measured.batched_layer_seconds, measured.prefill_layer_seconds_per_token)
    heads = (measured.head_decode_seconds, measured.batched_head_seconds)
    return measured if min(layers) > 0 and min(heads) >= 0 else None
