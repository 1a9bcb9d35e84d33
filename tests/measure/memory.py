"""Memory of each stage against its own weights: proportional set size without files, steady and at its highest."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.measure.report import Section
from tests.support.cluster import Cluster
from tests.support.real_model import real_model_folder

LOOK_SECONDS = 0.02
EMPTY_STAGE = """
import torch, transformers, sys
from transformers import AutoConfig, AutoModelForCausalLM
import services.stage.app, services.stage.computing, services.stage.slice_loading, services.stage.measure
torch.nn.Linear(64, 64)(torch.zeros(1, 64))
print("ready", flush=True)
sys.stdin.read()
"""


def proportional_bytes(process: int) -> int:
    """Pss_Anon of a process, 0 when it is gone; pages of files (torch's libraries) are others' too."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:")), 0)


def empty_stage_bytes() -> int:
    """What a stage takes before it has any weights: Python, torch, transformers and our own code."""
    with subprocess.Popen(
        [sys.executable, "-c", EMPTY_STAGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        taken = proportional_bytes(process.pid)
        process.kill()
    return taken


class Watch:
    """Notes the highest Pss of the two stages' workers while they start and work."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.highest, self.over = cluster, {0: 0, 1: 0}, threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            for stage in self.highest:
                try:
                    process = self.cluster.worker_pid(f"stage-{stage}")
                except (OSError, AssertionError, StopIteration, ValueError, KeyError, TypeError):
                    continue  # not started yet
                self.highest[stage] = max(self.highest[stage], proportional_bytes(process))


def measure() -> Section:
    """Two stages, from their start through a long request."""
    section = Section("memory", "Memory of a stage")
    empty = empty_stage_bytes()
    section.say(
        "Two stages of SmolLM2-135M-Instruct in float32; Pss_Anon of each worker process, at its highest from start "
        "through loading and a request of 400 tokens, and steady after it. An empty stage (torch, transformers and "
        f"noodle imported, no weights) takes {empty / 1e6:.0f} MB. Allowed: weights times 1.15 and an empty stage."
    )
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch) / "s", real_model_folder(), 2)
        watch = Watch(cluster)
        watch.thread.start()
        cluster.start()
        try:
            cluster.generate(list(range(100, 400)), max_new_tokens=100, ignore_eos=True)
            watch.over.set()
            watch.thread.join()
            steady = {stage: proportional_bytes(cluster.worker_pid(f"stage-{stage}")) for stage in (0, 1)}
            weights = {state["stage_id"]: state["weight_bytes"] for state in cluster.stage_states()}
        finally:
            watch.over.set()
            cluster.stop()
    rows = []
    for stage in (0, 1):
        allowed = weights[stage] * 1.15 + empty
        numbers = (weights[stage], steady[stage], watch.highest[stage], allowed)
        rows.append([stage, *(f"{number / 1e6:.0f} MB" for number in numbers), yes(numbers[2] <= allowed)])
    section.table(["stage", "weights", "steady", "highest", "allowed", "within"], rows)
    return section


def yes(value: bool) -> str:
    """A word for a table."""
    return "yes" if value else "**no**"
