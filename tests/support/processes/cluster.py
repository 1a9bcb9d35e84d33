"""A complete noodle for a test: `noodle up` on free ports with its own state folder, stopped at the end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READY_SECONDS = 180.0
DOWN_SECONDS = 60.0
ANSWER_SECONDS = 120.0
COMMAND_SECONDS = 240.0
# tests of equality need this; every rig has it unless a test overrides it
EXACT = {"NOODLE_EXECUTOR": "auto", "NOODLE_QUALITY": "exact"}


def free_ports(count: int) -> list[int]:
    """Return consecutive unused ports below the range of outgoing connections."""
    start = 20_000 + (os.getpid() * 37 + time.monotonic_ns() // 1000) % 10_000
    for first in [*range(start, 31_000, count), *range(20_000, start, count)]:
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise AssertionError("no free ports")


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return the value of `condition` once it is true; fail with `what` if it does not become true in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"in {seconds:.0f} seconds not: {what}"
        time.sleep(0.05)  # polling interval
    return value


class Services:
    """A running coordinator with its stages, and requests to them."""

    port: int
    stage_ports: list[int]

    @property
    def token(self) -> str:
        """Return the cluster token."""
        raise NotImplementedError

    def get(self, path: str, token: str = "") -> tuple[int, Any]:
        """Return status and decoded answer of a GET on the coordinator."""
        return request(self.port, "GET", path, token=token)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Return status and decoded answer of a POST on the coordinator; a body of bytes is sent as it is."""
        return request(self.port, "POST", path, body, **headers)

    def generate(self, prompt: str | list[int], **parameters: Any) -> dict[str, Any]:
        """Return a whole answer of /generate; fail if it is refused."""
        status, answer = self.post("/generate", {"inputs": prompt, "parameters": parameters})
        assert status == 200, answer
        return dict(answer)

    def stage_states(self) -> list[dict[str, Any]]:
        """Return the state that each stage reports of itself."""
        states = []
        for port in self.stage_ports:
            status, answer = request(port, "GET", "/health", token=self.token)
            assert status == 200, answer
            states.append(answer["state"])
        return states

    def is_ready(self) -> bool:
        """Return whether the coordinator reports ready; false while it is away."""
        try:
            return bool(self.get("/health")[1].get("status") == "ready")
        except (OSError, http.client.HTTPException, AttributeError):
            return False

    def is_empty(self) -> bool:
        """Return whether no request runs and only rows kept for prefix reuse are held; false while a part is away."""
        try:
            return self.metric(self.port, "noodle_num_requests_running") == 0 and self.kv_bytes_held() == 0
        except (OSError, http.client.HTTPException, AssertionError, AttributeError, KeyError):
            return False

    def kv_bytes_held(self) -> int:
        """Return the KV bytes of all stages, without the rows kept for prefix reuse."""
        kept_tokens = self.get("/health", self.token)[1]["kept_kv_tokens"]
        return sum(
            int(state["kv_bytes_held"]) - kept_tokens * int(state["kv_bytes_per_token"])
            for state in self.stage_states()
        )

    def metric(self, port: int, name: str) -> float:
        """Return one sample of a service's metrics, 0 if it does not exist yet."""
        _, text = request(port, "GET", "/metrics", token=self.token)
        lines = [line for line in text.decode().splitlines() if line.startswith(name + " ")]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


class Cluster(Services):
    """One running `noodle up`."""

    def __init__(
        self, state_dir: Path, model: Path | str, stages: int, *, checkout: Path | None = None, **variables: str
    ) -> None:
        self.state_dir, self.stages, self.checkout = state_dir, stages, checkout
        coordinator, planner, valkey, first_stage, *_ = free_ports(3 + stages)
        self.port = coordinator
        self.url = f"http://127.0.0.1:{coordinator}"
        self.stage_ports = [first_stage + index for index in range(stages)]
        self.valkey_port = valkey
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NOODLE_")}
        cache = {"NOODLE_CACHE_DIR": os.environ["NOODLE_CACHE_DIR"]} if "NOODLE_CACHE_DIR" in os.environ else {}
        self.environment = {
            **kept,
            **cache,
            "NOODLE_STATE_DIR": str(state_dir),
            "NOODLE_REPORTS_DIR": str(state_dir.with_name(state_dir.name + ".reports")),
            "NOODLE_COORDINATOR_PORT": str(coordinator),
            "NOODLE_PLANNER_PORT": str(planner),
            "NOODLE_VALKEY_PORT": str(valkey),
            "NOODLE_FIRST_STAGE_PORT": str(first_stage),
            "NOODLE_COORDINATOR_URL": self.url,
            "NOODLE_MODEL": str(model),
            "NOODLE_STAGES": str(stages),
            "NOODLE_THREADS": "1",
            **EXACT,
            **variables,
        }
        self.output_path = state_dir.with_name(state_dir.name + ".log")

    def start(self) -> Cluster:
        """Start it and wait until it is ready."""
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [self.python, "-m", "services.cli", "up"],
                env=self.environment,
                cwd=self.checkout,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(self.is_ready, READY_SECONDS, "ready")
        except BaseException:
            self.stop()
            raise
        return self

    def is_ready(self) -> bool:
        """Return whether the coordinator reports ready; fail with the output if `noodle up` has ended."""
        assert self.process.poll() is None, self.output_path.read_text(encoding="utf-8")
        return super().is_ready()

    def stop(self) -> None:
        """Stop it; fail if it does not stop in time."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def noodle(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a noodle command in this cluster's environment to its end."""
        source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            [sys.executable, "-P", "-m", "services.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
            **source,
        )

    @property
    def python(self) -> str:
        """Return the Python that starts it: this one, or that of another checkout."""
        return str(self.checkout / ".venv" / "bin" / "python") if self.checkout else sys.executable

    @property
    def token(self) -> str:
        """Return the cluster token."""
        return (self.state_dir / "run" / "cluster_token").read_text(encoding="utf-8").strip()

    def service_pid(self, name: str) -> int:
        """Return the process id that `noodle status` shows: gunicorn's master, or Valkey itself."""
        record = json.loads((self.state_dir / "run" / "run.json").read_bytes())
        return int(next(s["process"]["pid"] for s in record["services"] if s["name"] == name))

    def worker_pid(self, name: str) -> int:
        """Return the process id of a service's worker: the only child of gunicorn's master."""
        master = self.service_pid(name)
        children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii").split()
        assert len(children) == 1, children
        return int(children[0])


def request(port: int, method: str, path: str, body: Any = None, *, token: str = "", **headers: str) -> tuple[int, Any]:
    """Send one HTTP request on loopback; return status and answer, decoded if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        sent["Authorization"] = f"Bearer {token}"
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    if data is not None:
        sent.setdefault("Content-Type", "application/json")
    try:
        connection.request(method, path, data, sent)
        response = connection.getresponse()
        answer = response.read()
        is_json = (response.getheader("Content-Type") or "").startswith("application/json")
        return response.status, json.loads(answer) if is_json else answer
    finally:
        connection.close()


@contextlib.contextmanager
def running_cluster(
    state_dir: Path, model: Path | str, stages: int, *, checkout: Path | None = None, **variables: str
) -> Iterator[Cluster]:
    """Run a cluster that is ready; stop it at the end. `checkout` is another one than this, with its .venv."""
    cluster = Cluster(state_dir, model, stages, checkout=checkout, **variables).start()
    try:
        yield cluster
    finally:
        cluster.stop()
