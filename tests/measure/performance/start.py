"""From a fresh clone to the first token, a second start until ready, and the next token after a stage was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.measure.report import Section, spread
from tests.support.models.real_model import real_model_file
from tests.support.processes.cluster import Cluster

ROOT = Path(__file__).parents[3]
# each from the previous one; longer counts as failure
INSTALL_SECONDS = 3600.0
MODEL_SECONDS = 900.0
READY_SECONDS = 600.0
CLONE_SECONDS = 120.0
DOWN_SECONDS = 90.0
# variables absent from a user's terminal: settings of tests, and of a make that runs this
NOT_PASSED_ON = (
    "NOODLE_THREADS", "NOODLE_STAGES", "NOODLE_QUALITY", "NOODLE_EXECUTOR",
    "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS",
)  # fmt: skip
KILLS = 7  # of each kind of process


def measure() -> Section:
    """Measure a fresh clone through `make run` (packages, model, measurement, layers), then a second `noodle up`."""
    section = Section("start", "From nothing to the first token")
    section.say(
        "A clone in an empty folder with an empty cache of models and measurements; pip's own cache is as this "
        "machine has it. `make run` until the first token of a request, then `noodle up` again until ready, and stages "
        f"killed with SIGKILL. The load average was {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before."
    )
    with tempfile.TemporaryDirectory() as scratch:
        fresh_clone(Path(scratch), section)
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch) / "state", real_model_file(), 2, NOODLE_QUALITY="stored")
        started = time.monotonic()
        cluster.start()
        seconds = time.monotonic() - started
        try:
            after_kills = {what: seconds_after_kills(cluster, pid_of) for what, pid_of in KILLED.items()}
        except BaseException:
            cluster.stop()
            raise
        log_text = (Path(scratch) / "state" / "run" / "logs" / "stage-0.log").read_text(encoding="utf-8")
        cluster.stop()
    section.say(f"A second `noodle up` (model in the cache, machine measured) until ready: **{seconds:.1f} s**.")
    for what, gaps in after_kills.items():
        section.say()
        section.say(f"From the kill of {what} to the next token, {len(gaps)} times: **{spread(gaps)} s**.")
    section.say()
    section.say("What stage 0 did meanwhile, by its log:")
    section.say()
    for line in log_text.splitlines():
        if re.match(r"\d\d:\d\d:\d\d ", line):
            section.say(f"    {line[:100]}")
    return section


def seconds_after_kills(cluster: Cluster, pid_of: Callable[[Cluster, str], int]) -> list[float]:
    """Kill stages in turn; return the seconds from each kill to the first token of a new request."""
    found = []
    for number in range(KILLS):
        cluster.generate("The river comes down", max_new_tokens=1)
        began = time.monotonic()
        os.kill(pid_of(cluster, f"stage-{number % 2}"), signal.SIGKILL)
        cluster.generate(f"The sky is blue, for {number} reasons", max_new_tokens=1)
        found.append(time.monotonic() - began)
    return found


KILLED: dict[str, Callable[[Cluster, str], int]] = {
    "a stage's worker": Cluster.worker_pid,
    "all of a stage": Cluster.service_pid,
}


def fresh_clone(scratch: Path, section: Section) -> None:
    """Run `make run` in a clone of the newest commit; return the seconds of each part up to the first token."""
    clone = scratch / "noodle"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=CLONE_SECONDS)
    cluster = Cluster(scratch / "state", "SmolLM2-135M-Instruct", 2)
    cluster.environment |= {"NOODLE_CACHE_DIR": str(scratch / "cache")}
    for name in NOT_PASSED_ON:
        cluster.environment.pop(name, None)
    cluster.output_path = scratch / "make.log"
    started = time.monotonic()
    with cluster.output_path.open("wb") as log:
        cluster.process = subprocess.Popen(
            ["make", "run"], cwd=clone, env=cluster.environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        marks = watch(cluster, clone, started)
        cluster.generate("The capital of France is", max_new_tokens=1)
        marks.append(("first token", time.monotonic() - started))
        down = [clone / ".venv/bin/noodle", "down"]
        subprocess.run(down, env=cluster.environment, check=True, capture_output=True, timeout=DOWN_SECONDS)
        cluster.process.wait(DOWN_SECONDS)
    finally:
        if cluster.process.poll() is None:  # make, pip or `noodle up`, whose children end with them
            os.killpg(cluster.process.pid, signal.SIGKILL)
            cluster.process.wait()
    section.table(["fresh clone: `make run`", "seconds since its start"], [[what, f"{at:.1f}"] for what, at in marks])
    sizes = [(clone / ".venv", "`.venv`"), (scratch / "cache", "the cache of models and measurements")]
    section.say(" and ".join(f"{what} takes {disk_bytes(path) / 1e9:.1f} GB" for path, what in sizes) + ".")
    section.say()


def disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on disk."""
    done = subprocess.run(["du", "-sk", folder], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0]) * 1024


def watch(cluster: Cluster, clone: Path, started: float) -> list[tuple[str, float]]:
    """Return when packages, model files and cluster were there; fail if one takes too long."""
    marks: list[tuple[str, float]] = []
    signs: list[tuple[str, float, Callable[[], bool]]] = [
        ("packages installed", INSTALL_SECONDS, (clone / ".venv/.noodle-runtime").exists),
        ("ggml and kernels built", INSTALL_SECONDS, (clone / ".venv/.noodle-kernels").exists),
        ("model downloaded", MODEL_SECONDS, lambda: "planner" in services(cluster)),
        ("ready (stages started, measured and loaded)", READY_SECONDS, lambda: ready(cluster)),
    ]
    for what, seconds, sign in signs:
        end = time.monotonic() + seconds
        while not sign():
            if cluster.process.poll() is not None or time.monotonic() > end:
                said = cluster.output_path.read_text(encoding="utf-8", errors="replace")[-3000:]
                raise AssertionError(f"in {seconds:.0f} seconds not: {what}. It said last:\n{said}")
            time.sleep(0.1)  # the resolution of this measurement
        marks.append((what, time.monotonic() - started))
    return marks


def services(cluster: Cluster) -> set[str]:
    """Return the names of the services that run by now."""
    path = cluster.state_dir / "run" / "run.json"
    try:
        return {service["name"] for service in json.loads(path.read_bytes())["services"]}
    except (OSError, ValueError, KeyError):
        return set()


def ready(cluster: Cluster) -> bool:
    """Return whether the coordinator reports ready."""
    try:
        return bool(cluster.get("/health")[1].get("status") == "ready")
    except OSError:
        return False
