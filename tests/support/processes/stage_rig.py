"""Stage processes with a real Valkey and a plan from the test, optionally with a coordinator and relays."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noodle.cluster.plan import Plan, StageAssignment
from noodle.cluster.valkey import WorkQueue
from noodle.model.files import model_digest, read_config
from services.cli.local.run_folder import RunFolder
from services.cli.local.valkey import answers, server_binary, write_configuration
from tests.support.network.relay import Relay
from tests.support.processes.cluster import EXACT, Services, free_ports, request, wait_until

READY_SECONDS = 120.0


@dataclass
class StageRig:
    """Running stages and what is needed to talk to them."""

    urls: list[str]
    token: str
    plan: Plan
    work_queue: WorkQueue
    valkey: RunningValkey
    environment: dict[str, str] = field(default_factory=dict)
    relays: dict[int, Relay] = field(default_factory=dict)  # by stage; everything sent to the stage passes its relay

    def states(self) -> list[dict[str, Any]]:
        """Return the state that each stage reports of itself."""
        return [
            request(int(url.rsplit(":", 1)[1]), "GET", "/health", token=self.token)[1]["state"] for url in self.urls
        ]

    def metric(self, stage: int, name: str) -> float:
        """Return one sample of a stage's metrics."""
        _, text = request(int(self.urls[stage].rsplit(":", 1)[1]), "GET", "/metrics", token=self.token)
        line = next(line for line in text.decode().splitlines() if line.startswith(name + " "))
        return float(line.rsplit(" ", 1)[1])


class RunningValkey:
    """A Valkey configured as by `noodle up`, which can be killed and restarted with its data."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        self.port, self.password = port, secrets.token_hex(16)
        self._configuration = write_configuration(RunFolder(folder), port, self.password)
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = subprocess.Popen([server_binary(), self._configuration], stdout=subprocess.DEVNULL)
        wait_until(lambda: answers(self.port, self.password), 10, "Valkey answers")

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self._process.kill()
        self._process.wait(30)


@contextlib.contextmanager
def running_valkey(folder: Path, port: int) -> Iterator[RunningValkey]:
    """Run a Valkey; kill it at the end."""
    valkey = RunningValkey(folder, port)
    try:
        yield valkey
    finally:
        valkey.kill()


@contextlib.contextmanager
def running_stages(
    folder: Path,
    model: Path,
    layers: tuple[int, ...],
    *,
    relayed: Sequence[int] = (),
    absent: Sequence[int] = (),
    computed: Sequence[dict[str, Any]] = (),
    **variables: str,
) -> Iterator[StageRig]:
    """Run one stage process for each number of layers, ready for one plan; the test plays the `absent` ones.

    `computed` holds further fields of each stage's assignment: executor, weights, KV dtype and activation dtypes.
    """
    valkey_port, *ports = free_ports(1 + len(layers))
    token = secrets.token_hex(16)
    config = read_config(model)
    ends = [sum(layers[: index + 1]) for index in range(len(layers))]
    named = computed or [{}] * len(layers)
    with contextlib.ExitStack() as stack:
        relays = {index: stack.enter_context(Relay(ports[index])) for index in relayed}
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        planned = [relays[index].url if index in relays else url for index, url in enumerate(urls)]
        plan = Plan(
            version=1,
            model_digest=model_digest(model),
            layer_count=ends[-1],
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            stages=tuple(
                StageAssignment(index, "test", url, end - count, end, "float32", **named[index])
                for index, (url, count, end) in enumerate(zip(planned, layers, ends, strict=True))
            ),
        )
        valkey = stack.enter_context(running_valkey(folder / "valkey", valkey_port))
        work_queue = WorkQueue(f"redis://127.0.0.1:{valkey_port}", valkey.password)
        work_queue.put_plan(plan)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NOODLE_")} | {
            "NOODLE_CLUSTER_TOKEN": token,
            "NOODLE_VALKEY_URL": f"redis://127.0.0.1:{valkey_port}",
            "NOODLE_VALKEY_PASSWORD": valkey.password,
            "NOODLE_MODEL": str(model),
            "NOODLE_CACHE_DIR": str(folder / "cache"),
            "NOODLE_STATE_DIR": str(folder / "state"),
            "NOODLE_REPORTS_DIR": str(folder / "reports"),
            "NOODLE_MACHINE": "test",
            "NOODLE_THREADS": "1",
            **EXACT,
            **variables,
        }
        for index, port in enumerate(ports):
            if index not in absent:
                own = {"NOODLE_STAGE_ID": str(index), "NOODLE_STAGE_BIND": f"127.0.0.1:{port}"}
                process = started("services.stage", environment | own, folder / f"stage-{index}.log")
                stack.callback(process.wait, 30)
                stack.callback(process.terminate)

        def ready() -> bool:
            states = work_queue.stage_states()
            present = len(layers) - len(absent)
            return len(states) == present and all(state.ready_version == 1 for state in states.values())

        wait_until(ready, READY_SECONDS, "all stages are ready")
        yield StageRig(urls, token, plan, work_queue, valkey, environment, relays)


def started(module: str, environment: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a service's process with its log in a file."""
    with log_path.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)


class RigServices(Services):
    """A coordinator over the stages of a rig."""

    def __init__(self, rig: StageRig, port: int) -> None:
        self.rig, self.port = rig, port
        self.stage_ports = [int(url.rsplit(":", 1)[1]) for url in rig.urls]

    @property
    def token(self) -> str:
        """Return the cluster token."""
        return self.rig.token


@contextlib.contextmanager
def running_coordinator(
    rig: StageRig, folder: Path, *, until_ready: bool = True, **variables: str
) -> Iterator[RigServices]:
    """Run a coordinator process for a rig's plan, ready unless `until_ready` is false."""
    (port,) = free_ports(1)
    environment = rig.environment | {"NOODLE_COORDINATOR_BIND": f"127.0.0.1:{port}", **variables}
    process = started("services.coordinator", environment, folder / "coordinator.log")
    services = RigServices(rig, port)
    try:
        if until_ready:
            wait_until(services.is_ready, READY_SECONDS, "the coordinator is ready")
        yield services
    finally:
        process.terminate()
        process.wait(30)
