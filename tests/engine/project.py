"""One machine's containers: a fresh copy of this repository with its own name and ports, removed at the end."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.engine.engine import CONTROL, ROOT, STAGE, docker, run
from tests.support.processes.cluster import EXACT, free_ports, request, wait_until

READY_SECONDS = 240.0
COMPOSE_SECONDS = 180.0
TEST_FILE = "docker-compose.test.yml"
# all services available without a registry; nothing else needs Grafana
WITHOUT_GRAFANA = {
    "single": ("valkey", "planner", "coordinator", "stage-0", "stage-1", "prometheus"),
    "a": ("valkey", "planner", "coordinator", "stage-0", "prometheus"),
    "b": ("stage-1",),
}


class Project:
    """A folder with the files of a fresh clone, and `docker compose` in it."""

    def __init__(self, folder: Path, core: int | None = None, **variables: str) -> None:
        self.folder, self.name = folder, f"noodle-test-{secrets.token_hex(4)}"
        self.image_of = {"control": CONTROL, "stage": STAGE}
        _clone(folder)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("NOODLE_", "COMPOSE_"))
        }
        (folder / TEST_FILE).write_text(json.dumps({"services": self._overrides(core)}), encoding="utf-8")
        names = ("COORDINATOR", "VALKEY", "STAGE_0", "STAGE_1", "GRAFANA")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.ports = ports
        lines = [f"COMPOSE_PROJECT_NAME={self.name}", f"COMPOSE_FILE=docker-compose.yml:{TEST_FILE}"]
        lines += [f"NOODLE_{name}_PORT={port}" for name, port in ports.items()]
        lines += [f"{name}={value}" for name, value in (EXACT | variables).items()]
        self.env_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.kind = ""

    @property
    def env_path(self) -> Path:
        """Return the path of .env, which init continues."""
        return self.folder / ".env"

    @property
    def port(self) -> int:
        """Return the coordinator's published port."""
        return self.ports["COORDINATOR"]

    @property
    def token(self) -> str:
        """Return the cluster token."""
        return (self.folder / "secrets" / "cluster_token").read_text(encoding="utf-8").strip()

    @property
    def api_key(self) -> str:
        """Return the API key of clients."""
        return (self.folder / "secrets" / "api_key").read_text(encoding="utf-8").strip()

    def init(self, *options: str) -> str:
        """Run `docker compose run --rm init`, as in the README; return its output."""
        printed = self.compose("--progress", "quiet", "run", "--rm", "init", *options)
        self.kind = dict(line.split("=", 1) for line in self.env_path.read_text().splitlines() if "=" in line)[
            "COMPOSE_PROFILES"
        ]
        return printed

    def compose(self, *arguments: str, seconds: float = COMPOSE_SECONDS) -> str:
        """Return the standard output of `docker compose` in this folder; fail if it fails."""
        done = self.tried(*arguments, seconds=seconds)
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        return str(done.stdout)

    def tried(self, *arguments: str, seconds: float = COMPOSE_SECONDS) -> subprocess.CompletedProcess:
        """Run `docker compose` in this folder and return its result, failed or not."""
        return run(["docker", "compose", *arguments], seconds, cwd=self.folder, env=self.environment)

    def up(self, *services: str, options: tuple[str, ...] = ()) -> None:
        """Start these services, or all that are available, with the images that the tests have built."""
        chosen = services or WITHOUT_GRAFANA[self.kind]
        self.compose("up", "--detach", "--no-build", "--no-deps", *options, *chosen)

    def down(self) -> None:
        """Remove containers, networks and volumes of every profile."""
        if self.kind:
            self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")

    def container(self, service: str) -> str:
        """Return the id of a service's container."""
        found = self.compose("ps", "--all", "--quiet", service).split()
        assert len(found) == 1, (service, found)
        return found[0]

    def inspect(self, service: str) -> dict[str, Any]:
        """Return the engine's description of a service's container."""
        return dict(json.loads(docker("inspect", self.container(service)))[0])

    def logs(self, service: str) -> str:
        """Return a service's log since its container was made."""
        return self.compose("logs", "--no-color", "--no-log-prefix", service)

    def health(self, port: int | None = None) -> dict[str, Any]:
        """Return a published /health with the cluster token; the status is `silent` if nothing answers."""
        try:
            return dict(request(port or self.port, "GET", "/health", token=self.token)[1])
        except (OSError, TypeError, ValueError):
            return {"status": "silent"}

    def wait_ready(self, seconds: float = READY_SECONDS) -> float:
        """Wait until the coordinator is ready; return the seconds it took."""
        began = time.monotonic()

        def ready() -> bool:
            return bool(self.health().get("status") == "ready")

        try:
            wait_until(ready, seconds, "ready")
        except AssertionError as error:
            tail = self.compose("logs", "--no-color", "--tail", "15")
            raise AssertionError(f"{error}: {self.health()}\n{tail}") from None
        return time.monotonic() - began

    def generate(self, prompt: str, new_tokens: int) -> list[int]:
        """Return greedy token ids from /generate, through the published port."""
        parameters = {"max_new_tokens": new_tokens, "details": True, "ignore_eos": True}
        body = {"inputs": prompt, "parameters": parameters}
        status, answer = request(self.port, "POST", "/generate", body, token=self.api_key)
        assert status == 200, answer
        return [int(token["id"]) for token in answer["details"]["tokens"]]

    def fetched_bytes(self, service: str) -> int:
        """Return the bytes of weights that a stage has fetched, from the newest line of its log; 0 without one."""
        said = re.findall(r"(\d+) bytes of weights fetched since the start", self.logs(service))
        return int(said[-1]) if said else 0

    def left_behind(self) -> list[str]:
        """Return what the engine still has of this project."""
        label = f"label=com.docker.compose.project={self.name}"
        return [
            *docker("ps", "--all", "--quiet", "--filter", label).split(),
            *docker("network", "ls", "--quiet", "--filter", label).split(),
            *docker("volume", "ls", "--quiet", "--filter", label).split(),
        ]

    def _overrides(self, core: int | None) -> dict[str, Any]:
        """Return the overrides: images of these tests, and this machine's one core."""
        services: dict[str, Any] = {"init": {"image": CONTROL}}
        for name in WITHOUT_GRAFANA["single"]:
            services[name] = {} if core is None else {"cpuset": str(core)}
            if name in ("planner", "coordinator"):
                services[name]["image"] = CONTROL
            if name.startswith("stage"):
                services[name]["image"] = STAGE
        return services


def _clone(folder: Path) -> None:
    """Copy the files that a clone of this repository would have."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
