"""Runs the real `noodle up` as a process over stand-in services, on its own ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.processes.cluster import free_ports

ROOT = Path(__file__).parents[3]
FAKE_SERVICES = Path(__file__).parent / "fake_services"
WAIT_SECONDS = 30.0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return the value of `condition` once it is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {WAIT_SECONDS:.0f} s for {what}"
        time.sleep(0.02)
    return value


class UpRuns:
    """One state folder with its ports and orders; `close` ends everything that a test left running."""

    def __init__(self, folder: Path) -> None:
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.state_dir = folder / "state"
        self.run_dir = self.state_dir / "run"
        self.first_port = free_ports(12)[0]
        self.coordinator_port = self.first_port
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOODLE_")}
        self.environment = inherited | {
            "FAKE_ORDERS": str(self.orders),
            "NOODLE_STATE_DIR": str(self.state_dir),
            "NOODLE_REPORTS_DIR": str(self.state_dir.with_name("reports")),
            "NOODLE_CACHE_DIR": str(folder / "cache"),
            "NOODLE_COORDINATOR_PORT": str(self.first_port),
            "NOODLE_COORDINATOR_URL": f"http://127.0.0.1:{self.first_port}",
            "NOODLE_PLANNER_PORT": str(self.first_port + 1),
            "NOODLE_VALKEY_PORT": str(self.first_port + 2),
            "NOODLE_FIRST_STAGE_PORT": str(self.first_port + 3),
            "PYTHONPATH": os.pathsep.join([str(FAKE_SERVICES), str(ROOT)]),
        }
        self._log_path = folder / "up.out"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `noodle up` in the foreground; its output goes to `output()`."""
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "services.cli", "up", *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def start_until_ready(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `noodle up` and wait until it reports ready."""
        process = self.start(*arguments)
        wait_for(lambda: "noodle is ready" in self.output() or process.poll() is not None, "noodle up to be ready")
        assert process.poll() is None, self.output()
        return process

    def noodle(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another noodle command to its end."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "services.cli", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )

    def output(self) -> str:
        """Return what `noodle up` has printed so far."""
        return self._log_path.read_text() if self._log_path.exists() else ""

    def record(self) -> dict[str, Any]:
        """Return the current run.json."""
        value: dict[str, Any] = json.loads((self.run_dir / "run.json").read_text())
        return value

    def service(self, name: str) -> dict[str, Any]:
        """Return one service's part of run.json."""
        return next(service for service in self.record()["services"] if service["name"] == name)

    def lines(self, file_name: str) -> list[str]:
        """Return the lines that the stand-ins wrote."""
        path = self.orders / file_name
        return path.read_text().splitlines() if path.exists() else []

    def starts(self, name: str) -> list[int]:
        """Return the process ids of a stand-in's starts, in order."""
        return [int(line.split()[1]) for line in self.lines("starts") if line.split()[0] == name]

    def order(self, file_name: str, text: str = "") -> None:
        """Write an order for the stand-ins."""
        (self.orders / file_name).write_text(text)

    def living(self) -> list[int]:
        """Return every process of this state folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes()
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(self.orders).encode() in environment or str(self.state_dir).encode() in command:
                    found.append(int(entry.name))
        return found

    def nothing_is_left(self) -> bool:
        """Return whether no process, port or file of it is left."""
        for port in range(self.first_port, self.first_port + 6):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return False
        return not self.living() and not self.state_dir.exists()

    def close(self) -> None:
        """Kill everything."""
        for process_id in self.living():
            try:
                os.kill(process_id, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._started:
            process.wait(WAIT_SECONDS)
