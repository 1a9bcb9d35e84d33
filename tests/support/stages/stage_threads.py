"""Stages as threads of one process over streams in memory: queued transport without Valkey and processes."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from werkzeug.serving import make_server

from noodle.cluster.plan import Plan, StageAssignment
from noodle.config.environment import stage_config
from noodle.config.settings import StageConfig
from noodle.model.files import model_digest, read_config
from services.stage.app import create_app
from services.stage.executors.transformers.loading import load_slice
from services.stage.lifecycle import Lifecycle
from services.stage.stage import Stage
from services.stage.worker.worker import Role
from tests.support.network.memory_streams import MemoryStreams
from tests.support.processes.cluster import free_ports

KV_BYTES = 16 << 20


@dataclass
class ThreadRig:
    """The counterpart of `StageRig` for threads."""

    urls: list[str]
    token: str
    plan: Plan
    work_queue: MemoryStreams
    stages: list[Stage]
    lifecycles: list[Lifecycle]
    registries: list[CollectorRegistry]

    def states(self) -> list[dict[str, Any]]:
        """Return the state that each stage reports of itself."""
        return [msgspec.to_builtins(lifecycle.state) for lifecycle in self.lifecycles]

    def metric(self, stage: int, name: str) -> float:
        """Return one sample of a stage's metrics."""
        lines = generate_latest(self.registries[stage]).decode().splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).rsplit(" ", 1)[1])


@contextlib.contextmanager
def stage_threads(folder: Path, model: Path, layers: tuple[int, ...]) -> Iterator[ThreadRig]:
    """Run one stage for each number of layers, ready for one plan, each with a server for its activations."""
    token = secrets.token_hex(16)
    config = read_config(model)
    ends = [sum(layers[: index + 1]) for index in range(len(layers))]
    ports = free_ports(len(layers))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    plan = Plan(
        1, model_digest(model), ends[-1], config["hidden_size"], config["vocab_size"],
        config["max_position_embeddings"],
        tuple(
            StageAssignment(index, "test", url, end - count, end, "float32")
            for index, (url, count, end) in enumerate(zip(urls, layers, ends, strict=True))
        ),
    )  # fmt: skip
    rig = ThreadRig(urls, token, plan, MemoryStreams(), [], [], [])
    with contextlib.ExitStack() as stack:
        for index, port in enumerate(ports):
            stage_options = {
                "NOODLE_CLUSTER_TOKEN": token,
                "NOODLE_STAGE_ID": str(index),
                "NOODLE_STAGE_BIND": f"127.0.0.1:{port}",
                "NOODLE_MODEL": str(model),
                "NOODLE_CACHE_DIR": str(folder),
                "NOODLE_TRANSPORT": "queue",
            }
            stack.enter_context(_one_stage(rig, stage_config(stage_options), index, model))
        yield rig


@contextlib.contextmanager
def _one_stage(rig: ThreadRig, config: StageConfig, index: int, model: Path) -> Iterator[None]:
    registry = CollectorRegistry()
    stage = Stage(config, secrets.token_hex(16), registry, rig.work_queue)
    lifecycle = Lifecycle(config, stage, None)  # type: ignore[arg-type]  # nobody lets it beat
    rig.stages.append(stage)
    rig.lifecycles.append(lifecycle)
    rig.registries.append(registry)
    mine = rig.plan.stages[index]
    model_slice = load_slice(
        model, mine.start_layer, mine.end_layer, device="cpu", dtype=mine.dtype,
        context_length=rig.plan.context_length, progress=lambda done, total: None,
    )  # fmt: skip
    model_slice.set_kv_budget(KV_BYTES)
    worker = threading.Thread(target=stage.worker.run, name=f"worker {index}", daemon=True)
    worker.start()
    stage.start_queue()
    stage.become(rig.plan.version, Role(rig.plan, index, model_slice, None))
    app = create_app(config, stage, lifecycle, registry)
    server = make_server(config.bind.host, config.bind.port, app, threaded=True)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        stage.close()
        worker.join(10)
        serving.join(10)
