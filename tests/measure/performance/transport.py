"""The 20 prompts over every transport: equal tokens, the cost of a token, and the cost of a large step."""

from __future__ import annotations

import contextlib
import http.server
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from noodle.cluster.valkey import hop_stream
from noodle.wire.frames import body_digest, encode_entry
from noodle.wire.messages import ActivationRef, HopMessage, StepResult
from tests.measure.performance.speed import median_of_histogram, overhead_counts
from tests.measure.report import Section
from tests.support.models.prompts import PROMPTS
from tests.support.models.real_model import real_model_folder
from tests.support.models.tiny_model import make_tiny_model
from tests.support.network.callers import LastStageCaller
from tests.support.processes.stage_rig import StageRig, running_coordinator, running_stages

NEW_TOKENS = 64
LAYERS = (15, 15)
CUT_SECONDS = 2.0
WAYS = (
    ("direct", "direct", (), False),
    ("queue", "queue", (), False),
    ("auto", "auto", (), False),
    ("auto, through relays", "auto", (0, 1), False),
    (f"auto, through relays, all connections cut every {CUT_SECONDS:.0f} s", "auto", (0, 1), True),
)
HIDDEN_SIZE = 1024
STEP_TOKENS = (16, 64, 256, 1024, 4096)
STEPS = 15
RESULT_SECONDS = 60.0


def measure() -> Section:
    """Measure; fail if a token differs between two transports."""
    section = Section("transport", "The ways of a hop")
    folder = real_model_folder()
    section.say(
        f"SmolLM2-135M-Instruct, float32, two stages, {len(PROMPTS)} prompts one after the other, {NEW_TOKENS} tokens "
        "each, greedy, end of text ignored. Beyond computing: the median of `noodle_token_overhead_seconds`, what "
        "passes between two tokens of a request while no stage computes for it. The relays are Python threads and cost "
        "time of their own. A cut takes the hops to both stages, the results and the fetches."
    )
    rows: list[list[object]] = []
    expected: list[list[int]] = []
    for name, transport, relayed, is_cut in WAYS:
        with tempfile.TemporaryDirectory() as scratch:
            found, row = one_way(Path(scratch), folder, transport, relayed, is_cut)
        expected = expected or found
        equal = sum(left == right for left, right in zip(expected, found, strict=True))
        assert equal == len(PROMPTS), f"{name}: {equal} of {len(PROMPTS)}"
        rows.append([name, f"{equal} of {len(PROMPTS)}", *row])
    heads = ["way", "prompts equal to direct", "beyond computing, ms", "whole, ms per token", "steps direct, by queue"]
    section.table([*heads, "cuts"], rows)
    section.say(
        f"One step of n tokens of hidden size {HIDDEN_SIZE} in float32 into a stage of one layer: from sending to its "
        f"result, less computing; median of {STEPS}. By reference the digest is part of it."
    )
    section.table(["tokens", "MiB", "direct, ms", "by reference, ms"], large_steps())
    return section


def one_way(
    scratch: Path, folder: Path, transport: str, relayed: tuple[int, ...], is_cut: bool
) -> tuple[list[list[int]], list[object]]:
    """Return all tokens and their costs."""
    with (
        running_stages(scratch, folder, LAYERS, relayed=relayed, NOODLE_TRANSPORT=transport) as rig,
        running_coordinator(rig, scratch) as services,
        contextlib.ExitStack() as stack,
    ):
        services.generate(PROMPTS[0], max_new_tokens=8)
        before = overhead_counts(services)
        for relay in rig.relays.values() if is_cut else ():
            stack.enter_context(relay.cutting(CUT_SECONDS))
        start = time.monotonic()
        tokens = []
        for prompt in PROMPTS:
            details = services.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, details=True)["details"]
            tokens.append([token["id"] for token in details["tokens"]])
        seconds = time.monotonic() - start
        after = overhead_counts(services)
        median = median_of_histogram([(bound, after[bound] - before[bound]) for bound in after])
        ways = [
            sum(
                services.metric(port, f'noodle_hop_steps_total{{transport="{way}"}}')
                for port in (services.port, services.stage_ports[0])
            )
            for way in ("direct", "queue")
        ]
        cuts = int(seconds / CUT_SECONDS) if is_cut else 0
        per_token = seconds / (len(PROMPTS) * NEW_TOKENS)
        counted = f"{ways[0]:.0f}, {ways[1]:.0f}"
        return tokens, [f"{median * 1e3:.2f}", f"{per_token * 1e3:.1f}", counted, cuts]


def large_steps() -> list[list[object]]:
    """Measure the last of two stages, fed by this process over both transports."""
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(
            Path(scratch) / "wide", "llama", tokenizer=True, vocab_size=300, hidden_size=HIDDEN_SIZE,
            num_hidden_layers=2, max_position_embeddings=max(STEP_TOKENS) + 1,
        )  # fmt: skip
        rig_folder = Path(scratch) / "rig"
        rig_folder.mkdir()
        with (
            running_stages(rig_folder, model, (1, 1), absent=(0,), NOODLE_TRANSPORT="auto") as rig,
            TimedCaller(rig) as caller,
            keeping_bytes(rig.plan.stages[0].url) as kept,
        ):
            for tokens in STEP_TOKENS:
                body = np.linspace(-1, 1, tokens * HIDDEN_SIZE, dtype=np.float32).tobytes()
                kept.body = body
                times: dict[str, list[float]] = {"direct": [], "reference": []}
                for _ in range(STEPS + 1):
                    for way, seconds in times.items():
                        seconds.append(one_step(caller, tokens, body, by_reference=way == "reference"))
                medians = [f"{statistics.median(seconds[1:]) * 1e3:.2f}" for seconds in times.values()]
                rows.append([tokens, f"{len(body) / (1 << 20):.2f}", *medians])
    return rows


class TimedCaller(LastStageCaller):
    """Wakes up at once when a result arrives."""

    def __init__(self, rig: StageRig) -> None:
        super().__init__(rig)
        self.arrived: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self.heard = self  # type: ignore[assignment]  # all it takes of a list is append

    def append(self, message: HopMessage) -> None:
        """Keep results and wake the waiter."""
        if isinstance(message, StepResult):
            self.arrived.put(message)


def one_step(caller: TimedCaller, tokens: int, body: bytes, *, by_reference: bool) -> float:
    """Return the seconds of one step without its computation."""
    step = caller.step(body, count=tokens, dtype="float32", shape=[tokens, HIDDEN_SIZE], reserve=max(STEP_TOKENS))
    start = time.monotonic()
    if by_reference:
        reference = ActivationRef(step, caller.rig.plan.stages[0].url, "ab" * 16, len(body), body_digest(body))
        caller.rig.work_queue.append(hop_stream(1), encode_entry(reference))
    else:
        caller.send_message(step, body)
    result = caller.arrived.get(timeout=RESULT_SECONDS)
    assert result.spans, result.refusals
    return time.monotonic() - start - sum(timing.computed_seconds for timing in result.timings)


class _Keeper(http.server.BaseHTTPRequestHandler):
    """The server of stage 0."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        """Send the whole body, then read the fetcher's acknowledgement."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.kept.body)))
        self.end_headers()
        self.wfile.write(self.server.kept.body)
        self.rfile.read(len(b"1\r\n1\r\n0\r\n\r\n"))

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class _Kept:
    body = b""


@contextlib.contextmanager
def keeping_bytes(url: str) -> Iterator[_Kept]:
    """Run a server at stage 0's address that serves one body."""
    kept = _Kept()
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", int(url.rsplit(":", 1)[1])), _Keeper)
    server.kept, server.daemon_threads = kept, True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
