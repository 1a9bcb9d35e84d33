"""`noodle up` and commands beside it, over the real services with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes.cluster import Cluster, running_cluster, wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux"),
    pytest.mark.timeout(300),
]
GONE_SECONDS = 20.0  # gunicorn gives open requests 10 s


def processes_with(state_dir: Path) -> list[int]:
    """Return every process of this `noodle up`, itself included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(state_dir).encode() in told:
                found.append(int(entry.name))
    return found


def test_generate_streams_the_same_text_twice_with_a_seed(cluster: Cluster) -> None:
    arguments = ("generate", "the cat", "--max-new-tokens", "12", "--temperature", "0.8", "--seed", "7")
    first, second = cluster.noodle(*arguments), cluster.noodle(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert first.stdout == second.stdout
    assert cluster.noodle(*arguments, "--raw").returncode == 0


def test_ctrl_c_ends_a_generation_at_once_and_frees_the_cluster(cluster: Cluster) -> None:
    command = [sys.executable, "-P", "-m", "services.cli", "generate", "x", "--raw", "--max-new-tokens", "200"]
    process = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
    assert cluster.noodle("generate", "again", "--max-new-tokens", "2").returncode == 0


def test_verify_finds_a_split_model_equal_to_the_whole(cluster: Cluster) -> None:
    done = cluster.noodle("verify", "--prompts", "4", "--new-tokens", "16", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)["verdict"]
    assert (verdict["dtype"], verdict["tokens"], verdict["broken"]) == ("float32", 64, [])


def test_status_names_machine_layers_and_memory_of_every_stage(cluster: Cluster) -> None:
    status = json.loads(cluster.noodle("status", "--json").stdout)
    stages = [service for service in status["services"] if service["name"].startswith("stage")]
    assert status["status"] == "ready"
    assert [stage["layers"][0] for stage in stages] == [0, stages[0]["layers"][1]]
    assert stages[-1]["layers"][1] == 6
    assert all(stage["dtype"] == "float32" and stage["machine"] and stage["memory_bytes"] > 1e6 for stage in stages)
    assert "0 to " in cluster.noodle("status").stdout


@pytest.mark.parametrize(
    "end",
    [lambda process: process.send_signal(signal.SIGINT), lambda process: process.kill()],
    ids=["ctrl-c", "kill -9"],
)
def test_no_service_outlives_up(
    end: Callable[[subprocess.Popen[bytes]], None], tiny_folder: Path, tmp_path: Path
) -> None:
    state_dir = tmp_path / "state"
    with running_cluster(state_dir, tiny_folder, 1) as cluster:
        end(cluster.process)
        began_seconds = time.monotonic()
        cluster.process.wait(60)
        wait_until(lambda: not processes_with(state_dir), GONE_SECONDS, "every process gone")
        assert time.monotonic() - began_seconds < GONE_SECONDS
        cluster.noodle("down")
        left = {path.name for path in state_dir.glob("*")}  # a slow start may produce a first measurement
        assert left <= {"metrics.jsonl", "unsent-metrics-stage-0.jsonl"}


def test_a_split_that_does_not_add_up_is_refused_at_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "state", tiny_folder, 2)
    up = cluster.noodle("up", "--split", "3,4")
    assert up.returncode == 1
    assert "6" in up.stderr  # the model's layers
    assert "7" in up.stderr
    assert not (tmp_path / "state").exists()
