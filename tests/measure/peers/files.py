"""Starting with a person's own file, beside llama-server: seconds to the first token, bytes written, memory.

`python -m tests.measure files=FOLDER,FILE[,FILE...]`: FOLDER holds llama-server, each FILE is a GGUF.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.measure.peers.llama_cpp import background
from tests.measure.report import Section, spread
from tests.support.processes.cluster import Cluster, free_ports, request, wait_until

ROUNDS = 3
START_SECONDS = 600.0
PROMPT = "The capital of France is"
STAGES = 2


def measure(asked: str = "") -> Section:
    """Measure first and second starts of each file, in turn with llama-server's."""
    folder, *files = asked.split(",")
    server = Path(folder) / "llama-server"
    if not server.is_file() or not files:
        raise SystemExit("No llama-server or no file: python -m tests.measure files=FOLDER,FILE[,FILE...]")
    section = Section("files", "From a file to the first token")
    section.say(
        f"`noodle up` with {STAGES} stages beside llama-server, both on all cores, {ROUNDS} rounds in turn, until a "
        "request of one new token is answered. First: noodle's cache is empty, the file is in the page cache. Second: "
        "once more, with what the first left. Written: bytes in noodle's cache after both. Memory: private and mapped "
        "of each stage (PSS), beside the bytes of its tensors."
    )
    rows, memory_rows = [], []
    for path in map(Path, files):
        read_whole(path)
        seconds: dict[str, list[float]] = {"first": [], "second": [], "llama-server": []}
        for _ in range(ROUNDS):
            seconds["llama-server"].append(llama_server_seconds(server, path))
            with tempfile.TemporaryDirectory() as scratch:
                cache = Path(scratch) / "cache"
                for name in ("first", "second"):
                    taken, memory = noodle_seconds(path, Path(scratch) / name, cache)
                    seconds[name].append(taken)
                written = sum(each.stat().st_blocks * 512 for each in cache.rglob("*") if each.is_file())
            print(path.name, {name: round(each[-1], 1) for name, each in seconds.items()}, written, memory, flush=True)
        ratios = [
            [mine / other for mine, other in zip(seconds[name], seconds["llama-server"], strict=True)]
            for name in ("first", "second")
        ]
        share = f"{written / path.stat().st_size:.2%}"
        rows.append([path.name, *(spread(each, 1) for each in seconds.values()), *map(spread, ratios), share])
        memory_rows += [[path.name, *row] for row in memory]
    section.table(
        ["file", "first, s", "second, s", "llama-server, s", "first / theirs", "second / theirs", "written"], rows
    )
    section.table(["file", "stage", "tensors, MB", "KV rows, MB", "private, MB", "mapped, MB"], memory_rows)
    return section


def noodle_seconds(path: Path, state: Path, cache: Path) -> tuple[float, list[list[Any]]]:
    """Return the seconds from `noodle up` to the first token, and the memory of each stage."""
    variables = {"NOODLE_EXECUTOR": "auto", "NOODLE_QUALITY": "stored", "NOODLE_THREADS": "0"}
    cluster = Cluster(state, path, STAGES, NOODLE_CACHE_DIR=str(cache), **variables)
    began = time.monotonic()
    cluster.start()
    try:
        cluster.generate(PROMPT, max_new_tokens=1)
        taken = time.monotonic() - began
        rows = []
        for index, state_now in enumerate(cluster.stage_states()):
            private, mapped = pss_bytes(cluster.worker_pid(f"stage-{index}"))
            kv = state_now["kv_bytes_held"]
            rows.append([index, *(f"{each / 1e6:.0f}" for each in (state_now["weight_bytes"], kv, private, mapped))])
        return taken, rows
    finally:
        cluster.stop()


def pss_bytes(process_id: int) -> tuple[int, int]:
    """Return a process's anonymous and file-backed memory, shared pages divided by their users."""
    lines = Path(f"/proc/{process_id}/smaps_rollup").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if line.endswith("kB")}
    return sizes["Pss_Anon"], sizes["Pss_File"]


def llama_server_seconds(program: Path, path: Path) -> float:
    """Return the seconds from llama-server's start to its first token."""
    (port,) = free_ports(1)
    began = time.monotonic()
    words = (program, "-m", path, "-c", 4096, "-t", len(os.sched_getaffinity(0)), "--host", "127.0.0.1", "--port", port)
    with background(*words):
        body = {"prompt": PROMPT, "n_predict": 1, "temperature": 0}

        def answers() -> bool:
            try:
                return request(port, "POST", "/completion", body)[0] == 200
            except OSError:
                return False

        wait_until(answers, START_SECONDS, "llama-server answers")
        return time.monotonic() - began


def read_whole(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
