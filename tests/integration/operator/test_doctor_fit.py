"""A model that exceeds the memory of every machine: what doctor, plan and /health report."""

import contextlib
import json
import os
import secrets
import subprocess
import sys

import pytest

from tests.support.models.tiny_model import make_tiny_model
from tests.support.processes.cluster import free_ports, request, wait_until
from tests.support.processes.stage_rig import running_valkey, started

pytestmark = pytest.mark.timeout(300)
HIDDEN_SIZE = 1024
INTERMEDIATE_SIZE = 4096
LAYERS = 800  # of 51 MB each: more than forty gigabytes
MEASURED_SECONDS = 120.0


@pytest.fixture
def endless_folder(tmp_path):
    """A llama whose weights are a sparse file: large, but without blocks on the disk."""
    folder = tmp_path / "endless"
    make_tiny_model(
        folder,
        "llama",
        tokenizer=True,
        vocab_size=300,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=1,
    )
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    one_layer = {name: entry for name, entry in header.items() if ".layers.0." in name}
    names = [name for name in header if name not in one_layer]
    names += [name.replace(".layers.0.", f".layers.{layer}.") for layer in range(LAYERS) for name in one_layer]
    whole, position = {}, 0
    for name in names:
        like = header.get(name) or one_layer[".".join([*name.split(".")[:2], "0", *name.split(".")[3:]])]
        byte_count = like["data_offsets"][1] - like["data_offsets"][0]
        whole[name] = {**like, "data_offsets": [position, position + byte_count]}
        position += byte_count
    head = json.dumps(whole).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + position)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}), encoding="utf-8")
    return folder


def test_a_model_that_does_not_fit_is_told_with_its_cures(endless_folder, tmp_path, monkeypatch):
    valkey_port, coordinator_port, planner_port, stage_port = free_ports(4)
    token = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey(tmp_path / "valkey", valkey_port))
        variables = {
            "NOODLE_CLUSTER_TOKEN": token,
            "NOODLE_VALKEY_URL": f"redis://127.0.0.1:{valkey_port}",
            "NOODLE_VALKEY_PASSWORD": valkey.password,
            "NOODLE_MODEL": str(endless_folder),
            "NOODLE_CACHE_DIR": str(tmp_path / "cache"),
            "NOODLE_STATE_DIR": str(tmp_path / "state"),
            "NOODLE_REPORTS_DIR": str(tmp_path / "reports"),
            "NOODLE_STAGES": "1",
            "NOODLE_THREADS": "1",
            "NOODLE_MACHINE": "laptop",
            "NOODLE_COORDINATOR_BIND": f"127.0.0.1:{coordinator_port}",
            "NOODLE_COORDINATOR_URL": f"http://127.0.0.1:{coordinator_port}",
            "NOODLE_PLANNER_BIND": f"127.0.0.1:{planner_port}",
            "NOODLE_PLANNER_URL": f"http://127.0.0.1:{planner_port}",
            "NOODLE_STAGE_BIND": f"127.0.0.1:{stage_port}",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        environment = dict(os.environ)
        for service in ("planner", "stage", "coordinator"):
            process = started(f"services.{service}", environment, tmp_path / f"{service}.log")
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        def planner_has_failed():
            with contextlib.suppress(OSError):
                return request(planner_port, "GET", "/health", token=token)[1]["status"] == "failed"

        wait_until(planner_has_failed, MEASURED_SECONDS, "the planner has seen the machine")
        command = [sys.executable, "-m", "services.cli", "doctor"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        _, health = request(coordinator_port, "GET", "/health", token=token)
    print(done.stdout)
    print("health:", health["detail"])
    assert done.returncode == 1
    assert "The model does not fit." in done.stdout
    assert "bytes short" in done.stdout
    assert "laptop" in done.stdout
    assert health["status"] == "failed"
