"""Memory of each stage compared with its weights: anonymous proportional set size, steady and at its peak."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.measure.report import GGML, TRANSFORMERS, Section, named, title_of
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster

LOOK_SECONDS = 0.02
PROMPT_TOKENS, NEW_TOKENS = 300, 100
SHARES = {TRANSFORMERS: 1.15, GGML: 1.1}
FORMATS = {TRANSFORMERS: ("f32",), GGML: ("f32", "f16", "q8_0")}
EMPTY_STAGE = """
import torch, transformers, sys
from transformers import AutoConfig, AutoModelForCausalLM
import services.stage.app, services.stage.selection.report, services.stage.selection.benchmark
import services.stage.executors.transformers.loading
torch.nn.Linear(64, 64)(torch.zeros(1, 64))
if "ggml" in sys.argv:
    from services.stage.executors.ggml import loading
    loading.load_ggml()
print("ready", flush=True)
sys.stdin.read()
"""


def proportional_bytes(process: int) -> int:
    """Return Pss_Anon of a process, 0 if it is gone; file pages (torch's libraries) are shared and left out."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:")), 0)


def empty_stage_bytes(executor: str) -> int:
    """Return the memory of a stage without weights: Python, torch, transformers, ggml if used, and our code."""
    with subprocess.Popen(
        [sys.executable, "-c", EMPTY_STAGE, executor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        taken = proportional_bytes(process.pid)
        process.kill()
    return taken


class Watch:
    """Records the highest Pss of the two stages' workers while they start and work."""

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


def measure(executor: str = TRANSFORMERS) -> Section:
    """Measure two stages from their start through a long request."""
    section = Section(named("memory", executor), title_of("Memory of a stage", executor))
    empty = empty_stage_bytes(executor)
    imported = "torch, transformers and noodle" if executor == TRANSFORMERS else "torch, transformers, ggml and noodle"
    share = SHARES[executor]
    section.say(
        "Two stages of SmolLM2-135M-Instruct; Pss_Anon of each worker process, at its highest from start "
        f"through loading and a request of {PROMPT_TOKENS + NEW_TOKENS} tokens, and steady after it. An empty stage "
        f"({imported} imported, no weights) takes {empty / 1e6:.0f} MB. Allowed: weights times "
        f"{share}, KV rows and an empty stage."
    )
    rows = [row for weights in FORMATS[executor] for row in of_format(executor, weights, share, empty)]
    section.table(["format", "stage", "weights", "KV", "steady", "highest", "allowed", "within"], rows)
    return section


def of_format(executor: str, weights: str, share: float, empty: int) -> list[list[object]]:
    """Return one row for each stage."""
    variables = {"NOODLE_EXECUTOR": executor, "NOODLE_WEIGHTS": weights}
    if weights != "f32":
        variables["NOODLE_QUALITY"] = "stored"
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch) / "s", real_model_folder(), 2, **variables)
        watch = Watch(cluster)
        watch.thread.start()
        try:
            cluster.start()
            cluster.generate(list(range(100, 100 + PROMPT_TOKENS)), max_new_tokens=NEW_TOKENS, ignore_eos=True)
            watch.over.set()
            watch.thread.join()
            steady = {stage: proportional_bytes(cluster.worker_pid(f"stage-{stage}")) for stage in (0, 1)}
            states = {state["stage_id"]: state for state in cluster.stage_states()}
        finally:
            watch.over.set()
            cluster.stop()
    rows: list[list[object]] = []
    for stage in (0, 1):
        held = states[stage]["weight_bytes"], states[stage]["kv_bytes_held"]
        allowed = held[0] * share + held[1] + empty
        numbers = (*held, steady[stage], watch.highest[stage], allowed)
        is_within = yes(watch.highest[stage] <= allowed)
        rows.append([weights, stage, *(f"{number / 1e6:.0f} MB" for number in numbers), is_within])
    return rows


def yes(value: bool) -> str:
    return "yes" if value else "**no**"
