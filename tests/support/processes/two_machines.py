"""Planner, coordinator and two stages as processes configured as if on two machines."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.network.relay import Relay
from tests.support.processes.cluster import EXACT, Services, free_ports, wait_until
from tests.support.processes.stage_rig import READY_SECONDS, running_valkey, started

STOP_SECONDS = 30.0


class TwoMachines(Services):
    """The running processes; machine-a has all but stage 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token_path = folder / "cluster_token"
        self.token_path.write_text(secrets.token_hex(16), encoding="utf-8")
        self.port, self.planner_port, self.valkey_port, *self.stage_ports = free_ports(5)

    @property
    def token(self) -> str:
        """Return the cluster token."""
        return self.token_path.read_text(encoding="utf-8")


@contextlib.contextmanager
def two_machines(
    folder: Path,
    model: Path,
    *,
    link: Callable[[int], contextlib.AbstractContextManager[Relay]] | None = None,
    is_ready: bool = True,
    **variables: str,
) -> Iterator[TwoMachines]:
    """Run both machines, ready unless the caller waits itself; stop them at the end.

    With a `link`, which makes a relay to a port, machine B has no model and its own cache, and reaches the coordinator
    through that relay.
    """
    folder.mkdir()
    machines = TwoMachines(folder)
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(running_valkey(folder / "valkey", machines.valkey_port))
        common = {name: value for name, value in os.environ.items() if not name.startswith("NOODLE_")} | {
            "NOODLE_CLUSTER_TOKEN_FILE": str(machines.token_path),
            "NOODLE_VALKEY_URL": f"redis://127.0.0.1:{machines.valkey_port}",
            "NOODLE_VALKEY_PASSWORD": valkey.password,
            "NOODLE_MODEL": str(model),
            "NOODLE_CACHE_DIR": str(folder / "cache"),
            "NOODLE_STATE_DIR": str(folder / "state"),
            "NOODLE_REPORTS_DIR": str(folder / "reports"),
            "NOODLE_COORDINATOR_BIND": f"127.0.0.1:{machines.port}",
            "NOODLE_COORDINATOR_URL": f"http://127.0.0.1:{machines.port}",
            "NOODLE_PLANNER_BIND": f"127.0.0.1:{machines.planner_port}",
            "NOODLE_PLANNER_URL": f"http://127.0.0.1:{machines.planner_port}",
            "NOODLE_THREADS": "1",
            **EXACT,
            **variables,
        }
        own: list[tuple[str, dict[str, str]]] = [
            ("planner", {"NOODLE_MACHINE": "machine-a"}),
            ("coordinator", {"NOODLE_MACHINE": "machine-a"}),
        ]
        for stage_id, port in enumerate(machines.stage_ports):
            machine = ("machine-a", "machine-b")[stage_id]
            bind = f"127.0.0.1:{port}"
            options = {"NOODLE_MACHINE": machine, "NOODLE_STAGE_ID": str(stage_id), "NOODLE_STAGE_BIND": bind}
            if link is not None and machine == "machine-b":
                relay = stack.enter_context(link(machines.port))
                options |= {"NOODLE_MODEL": "", "NOODLE_COORDINATOR_URL": relay.url}
                options |= {"NOODLE_CACHE_DIR": str(folder / "cache-b")}
            own.append(("stage", options))
        for name, options in own:
            log_path = folder / f"{name}-{options.get('NOODLE_STAGE_ID', '')}.log"
            process = started(f"services.{name}", common | options, log_path)
            stack.callback(process.wait, STOP_SECONDS)
            stack.callback(process.terminate)
        if is_ready:
            wait_until(machines.is_ready, READY_SECONDS, "the coordinator is ready")
        yield machines
