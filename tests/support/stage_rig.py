"""Stage processes with a real Valkey and a plan written by the test, and nothing else."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.model_files import model_digest, read_config
from noodle.plan import Plan, StageAssignment
from noodle.work_queue import WorkQueue
from services.cli.run_state import RunFolder
from services.cli.valkey import answers, server_binary, write_configuration
from tests.support.cluster import free_ports, request, wait_until

READY_SECONDS = 120.0


@dataclass
class StageRig:
    """Running stages and what one needs to talk to them."""

    urls: list[str]
    token: str
    plan: Plan
    work_queue: WorkQueue

    def states(self) -> list[dict[str, Any]]:
        """What every stage says of itself."""
        return [
            request(int(url.rsplit(":", 1)[1]), "GET", "/health", token=self.token)[1]["state"] for url in self.urls
        ]

    def metric(self, stage: int, name: str) -> float:
        """One sample of a stage's metrics."""
        _, text = request(int(self.urls[stage].rsplit(":", 1)[1]), "GET", "/metrics", token=self.token)
        line = next(line for line in text.decode().splitlines() if line.startswith(name + " "))
        return float(line.rsplit(" ", 1)[1])


@contextlib.contextmanager
def running_valkey(folder: Path, port: int) -> Iterator[str]:
    """A Valkey as `noodle up` configures it; gives its password."""
    folder.mkdir()
    password = secrets.token_hex(16)
    configuration = write_configuration(RunFolder(folder), port, password)
    with subprocess.Popen([server_binary(), configuration], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: answers(port, password), 10, "Valkey answers")
            yield password
        finally:
            process.terminate()


@contextlib.contextmanager
def running_stages(folder: Path, model: Path, layers: tuple[int, ...], **variables: str) -> Iterator[StageRig]:
    """One stage process for each number of layers, ready for one plan."""
    valkey_port, *ports = free_ports(1 + len(layers))
    token = secrets.token_hex(16)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    config = read_config(model)
    ends = [sum(layers[: index + 1]) for index in range(len(layers))]
    plan = Plan(
        version=1,
        model_digest=model_digest(model),
        layer_count=ends[-1],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        stages=tuple(
            StageAssignment(index, "test", url, end - count, end, "float32")
            for index, (url, count, end) in enumerate(zip(urls, layers, ends, strict=True))
        ),
    )
    with contextlib.ExitStack() as stack:
        password = stack.enter_context(running_valkey(folder / "valkey", valkey_port))
        work_queue = WorkQueue(f"redis://127.0.0.1:{valkey_port}", password)
        work_queue.put_plan(plan)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NOODLE_")} | {
            "NOODLE_CLUSTER_TOKEN": token,
            "NOODLE_VALKEY_URL": f"redis://127.0.0.1:{valkey_port}",
            "NOODLE_VALKEY_PASSWORD": password,
            "NOODLE_MODEL": str(model),
            "NOODLE_CACHE_DIR": str(folder / "cache"),
            "NOODLE_MACHINE": "test",
            "NOODLE_THREADS": "1",
            **variables,
        }
        for index, port in enumerate(ports):
            own = {"NOODLE_STAGE_ID": str(index), "NOODLE_STAGE_BIND": f"127.0.0.1:{port}"}
            log = stack.enter_context((folder / f"stage-{index}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "services.stage"], env=environment | own, stdout=log, stderr=log
            )
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        def ready() -> bool:
            states = work_queue.stage_states()
            return len(states) == len(layers) and all(state.ready_version == 1 for state in states.values())

        wait_until(ready, READY_SECONDS, "all stages are ready")
        yield StageRig(urls, token, plan, work_queue)
