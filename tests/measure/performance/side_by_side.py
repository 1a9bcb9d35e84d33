"""Two slices on two cores, one at a time and both at once, without the rest of noodle.

Two machines share no memory. Two cores do, and what they lose by it bounds what two stages on this machine can achieve:
read the shares of the best possible in docs/measurements.md beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from tests.measure.report import TRANSFORMERS, Section, named, title_of
from tests.support.models.real_model import real_model_folder

LAYERS = 30
CUT = 16  # as the planner cuts the default model for two such stages
SLICES = {"whole": (0, 0, LAYERS), "first": (0, 0, CUT), "second": (1, CUT, LAYERS)}  # core, layers from and to
SESSIONS = (1, 4, 8, 16)  # in one step
PROMPT_TOKENS, LONGEST = 16, 60
ROUNDS = 7
ROUND_SECONDS = 0.8
LOAD_SECONDS = 120.0


def measure(executor: str = TRANSFORMERS) -> Section:
    """Measure steps of one token for several sessions, in float32 with this executor."""
    section = Section(named("side-by-side", executor), title_of("Two cores at once", executor))
    folder = real_model_folder()
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name, (core, first, last) in SLICES.items():
        ends[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, executor, folder, core, first, last), daemon=True).start()
        if not ends[name].poll(LOAD_SECONDS):
            raise TimeoutError(f"layers {first} to {last} did not load in {LOAD_SECONDS:.0f} seconds")
        ends[name].recv()
    section.say(
        f"SmolLM2-135M-Instruct, float32; layers 0 to {CUT} on one core, {CUT} to {LAYERS} and the head on another, "
        f"each without the other and with it; {ROUNDS} rounds in turn, medians in ms. Reachable: half of the whole "
        "model's time over the slower slice's beside the other, of the best that two machines could do."
    )
    section.table(
        ["sessions in a step", "whole", "first", "second", "first beside", "second beside", "reachable"],
        [line_of(ends, sessions) for sessions in SESSIONS],
    )
    for end in ends.values():
        end.send(0)
    return section


def line_of(ends: dict[str, Connection], sessions: int) -> list[object]:
    """Return one row of the table."""
    rounds = [[*(together(ends, [name], sessions)[0] for name in SLICES),
               *together(ends, ["first", "second"], sessions)] for _ in range(ROUNDS)]  # fmt: skip
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    reachable = medians[0] / 2 / max(medians[3:])
    return [sessions, *(f"{each * 1e3:.1f}" for each in medians), f"{reachable:.2f}"]


def together(ends: dict[str, Connection], names: list[str], sessions: int) -> list[float]:
    """Return the seconds of a step of each slice while all compute at the same time."""
    for name in names:
        ends[name].send(sessions)
    return [ends[name].recv() for name in names]


def serve(asked: Connection, executor: str, folder: Path, core: int, start: int, end: int) -> None:
    """Serve a slice in its own process: compute rounds for the received number of sessions; 0 ends it."""
    os.sched_setaffinity(0, {core})
    import torch

    from tests.support.stages.executors import load_exact

    torch.set_num_threads(1)
    model_slice = load_exact(executor, folder, start, end, context_length=2048)
    for position in range(PROMPT_TOKENS):
        step(model_slice, max(SESSIONS), position)
    asked.send("ready")
    while sessions := int(asked.recv()):
        seconds = []
        position, stop_at = PROMPT_TOKENS, time.perf_counter() + ROUND_SECONDS
        while time.perf_counter() < stop_at:
            begin = time.perf_counter()
            step(model_slice, sessions, position)
            seconds.append(time.perf_counter() - begin)
            position = position + 1 if position < LONGEST else PROMPT_TOKENS
        asked.send(statistics.median(seconds))


def step(model_slice: ModelSlice, sessions: int, position: int) -> None:
    """Return a batch with the token at this position of each session."""
    spans = tuple(Span(f"session {index}", position, 1, LONGEST + 1) for index in range(sessions))
    rows = np.arange(sessions if model_slice.is_last else 0)
    if model_slice.is_first:
        batch = PackedBatch(spans, rows, token_ids=np.arange(1000, 1000 + sessions))
    else:
        numbers = np.random.default_rng(position).standard_normal((sessions, model_slice.hidden_size), np.float32)
        batch = PackedBatch(
            spans, rows, hidden_states=ActivationTensor("float32", numbers.shape, numbers.data.cast("B"))
        )
    model_slice.forward(batch)
