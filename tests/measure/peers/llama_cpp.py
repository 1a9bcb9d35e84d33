"""llama.cpp's programs, built elsewhere: a server alone, a server with another machine over RPC, and its own bench."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.measure.peers.streams import llama_side
from tests.measure.performance.streams import Side
from tests.support.processes.cluster import free_ports, request, wait_until

START_SECONDS = 600.0
TRIAL_PROMPT_TOKENS, TRIAL_NEW_TOKENS, TRIAL_REPETITIONS = 256, 16, 3


@dataclass(frozen=True)
class LlamaCpp:
    """The folder of the programs, a model and the settings that were fastest."""

    programs: Path
    model: Path
    flash_attention: str = "auto"

    def tried(self, core: int) -> tuple[str, str]:
        """Return which flash attention is faster for prompts and tokens together on one core, and the figures."""
        rates = {choice: self._bench(core, choice) for choice in ("on", "off")}
        best = max(rates, key=lambda choice: math.prod(rates[choice]))
        figures = ", ".join(f"{choice} {prefill:.1f} and {decode:.1f}" for choice, (prefill, decode) in rates.items())
        return best, f"by llama-bench on one core, prefill and decode in tokens/s: {figures}"

    def _bench(self, core: int, flash_attention: str) -> tuple[float, float]:
        """Return the best of some repetitions: the least disturbed one."""
        said = run(
            "taskset", "-c", core, self.programs / "llama-bench", "-m", self.model, "-t", 1, "-fa", flash_attention,
            "-p", TRIAL_PROMPT_TOKENS, "-n", TRIAL_NEW_TOKENS, "-r", TRIAL_REPETITIONS, "-o", "jsonl",
        )  # fmt: skip
        best = {bool(row["n_prompt"]): max(row["samples_ts"]) for row in map(json.loads, said.splitlines())}
        return best[True], best[False]

    @contextlib.contextmanager
    def server(
        self, cores: Sequence[int], *, streams: int, context_tokens: int, far: tuple[int, int] | None
    ) -> Iterator[Side]:
        """Run the server with a thread on each core; `far`: core of an RPC server, its number of last layers."""
        (port,) = free_ports(1)
        words: list[object] = [
            "-m", self.model, "-t", len(cores), "-fa", self.flash_attention, "-fit", "off", "-np", streams, "-c",
            streams * context_tokens, "--no-kv-unified", "-cram", 0, "-ctxcp", 0, "--host", "127.0.0.1", "--port", port,
        ]  # fmt: skip
        with contextlib.ExitStack() as stack:
            if far:
                core, layers = far
                rpc_port = stack.enter_context(self._rpc_server(core))
                words += ["--rpc", f"127.0.0.1:{rpc_port}", "-ngl", layers + 1]  # the head is counted as one
            stack.enter_context(background("taskset", "-c", joined(cores), self.programs / "llama-server", *words))
            wait_until(lambda: is_ready(port), START_SECONDS, "llama-server is ready")
            yield llama_side(port)

    @contextlib.contextmanager
    def _rpc_server(self, core: int) -> Iterator[int]:
        (port,) = free_ports(1)
        words = ("-H", "127.0.0.1", "-p", port, "-t", 1)
        with background("taskset", "-c", core, self.programs / "ggml-rpc-server", *words):
            wait_until(lambda: is_taken(port), START_SECONDS, "the RPC server listens")
            yield port


def joined(cores: Sequence[int]) -> str:
    """Return cores as taskset takes them."""
    return ",".join(map(str, cores))


def is_ready(port: int) -> bool:
    """Return whether llama-server has loaded its model."""
    try:
        return request(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def is_taken(port: int) -> bool:
    """Return whether something listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def background(*words: object) -> Iterator[None]:
    """Run a program in the background."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([str(word) for word in words], stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def run(*words: object) -> str:
    """Run a program and return its output; fail with its errors."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]}: {done.stderr[-2000:]}")
    return done.stdout


def measured_cores() -> list[int]:
    """Return the two cores that stand for machines."""
    return sorted(os.sched_getaffinity(0))[:2]
