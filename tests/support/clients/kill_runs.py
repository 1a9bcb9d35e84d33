"""Requests that run while something is killed, and clients that come back for the rest of their streams."""

from __future__ import annotations

import http.client
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.clients.event_reader import EventReader
from tests.support.models.prompts import PROMPTS
from tests.support.processes.cluster import Cluster, Services, wait_until

STREAMS = 8
NEW_TOKENS = 48
RESUME_SECONDS = 120
RUN_SECONDS = 240.0  # for all requests of one run to end, whatever was killed
RETRY_SECONDS = 0.1  # between two tries of a client to come back
SECOND_DEATH_SECONDS = 2.0  # from Valkey's death to the coordinator's, where both die

SERVICES_OF = {
    "stage 0": ("stage-0",),
    "stage 1": ("stage-1",),
    "coordinator": ("coordinator",),
    "valkey": ("valkey",),
    "planner": ("planner",),
    "all of machine A": ("coordinator", "planner", "valkey", "stage-0"),
}
KINDS = (*SERVICES_OF, "valkey, then the coordinator", "a link between stages")


@dataclass
class Stream:
    """One request and its client: it notes each token and when it came, and comes back as often as it must."""

    services: Services
    body: dict[str, Any]
    request_id: str
    tokens: list[int] = field(default_factory=list)
    arrived_at: list[float] = field(default_factory=list)
    breaks: int = 0
    failure: str = ""
    is_accepted: bool = False
    sent_again: int = 0  # it was accepted, gave no token yet, and then nobody knew it

    def run(self) -> None:
        """Read to the end; a token that comes twice or out of order fails."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            try:
                if self._read():
                    return
            except (OSError, http.client.HTTPException):
                pass  # whoever it was connected to has died: it comes back below
            self.breaks += 1
            time.sleep(RETRY_SECONDS)
        self.failure = self.failure or "not finished in time"

    def _read(self) -> bool:
        """True when the request has ended."""
        if not self.is_accepted:
            reader = EventReader(
                self.services.port, "POST", "/generate_stream", self.body,
                X_Request_Id=self.request_id, Idempotency_Key=self.request_id,
            )  # fmt: skip
        else:
            path = f"/v1/requests/{self.request_id}/events?after={len(self.tokens)}"
            reader = EventReader(self.services.port, "GET", path)
        with reader:
            if reader.status == 404 and self.is_accepted and not self.tokens:
                self.is_accepted = False
                self.sent_again += 1
            if reader.status != 200:
                return False
            self.is_accepted = True
            for event_id, event in reader:
                if "error" in event:
                    self.failure = event["error"]["message"]
                    return "stopping" not in self.failure
                assert int(event_id) == len(self.tokens) + 1, f"token {event_id} came after {len(self.tokens)}"
                self.tokens.append(event["token"]["id"])
                self.arrived_at.append(time.monotonic())
                if event["details"] is not None:
                    self.failure = ""
                    return True
        return False


def requests_of(run: str) -> list[tuple[str, dict[str, Any]]]:
    """Half greedy, half drawn with a seed."""
    return [
        (
            f"{run}-{index}",
            {
                "inputs": PROMPTS[index],
                "parameters": {
                    "max_new_tokens": NEW_TOKENS,
                    "ignore_eos": True,
                    "resume_seconds": RESUME_SECONDS,
                    **({"temperature": 0.8, "top_p": 0.95, "seed": 100 + index} if index % 2 else {}),
                },
            },
        )
        for index in range(STREAMS)
    ]


def run_streams(services: Services, run: str, kill: Callable[[], None] | None, kill_after: int = 0) -> list[Stream]:
    """All streams at once; when they have `kill_after` tokens together, something dies."""
    streams = [Stream(services, body, request_id) for request_id, body in requests_of(run)]
    threads = [threading.Thread(target=stream.run) for stream in streams]
    for thread in threads:
        thread.start()
    if kill is not None:
        wait_until(lambda: sum(len(s.tokens) for s in streams) >= kill_after, RUN_SECONDS, "the streams run")
        kill()
    for thread in threads:
        thread.join(RUN_SECONDS)
        assert not thread.is_alive(), "a stream hangs"
    return streams


def random_moment(chance: random.Random) -> int:
    """After how many tokens of all streams."""
    return chance.randrange(STREAMS, STREAMS * NEW_TOKENS // 2)


def killer(cluster: Cluster, kind: str) -> Callable[[], None]:
    """What kills, without a warning, all processes of one kind of death."""

    def kill_services(names: Sequence[str]) -> None:
        pids = [pid for name in names for pid in pids_of(cluster, name)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # a worker may go as soon as its master is gone

    def kill() -> None:
        if kind == "valkey, then the coordinator":
            kill_services(["valkey"])
            threading.Event().wait(SECOND_DEATH_SECONDS)
            kill_services(["coordinator"])
        else:
            kill_services(SERVICES_OF[kind])

    return kill


def pids_of(cluster: Cluster, name: str) -> list[int]:
    """A service's process and those that it started."""
    master = cluster.service_pid(name)
    try:
        children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []
    return [master, *map(int, children)]


def processes_of(cluster: Cluster) -> list[int]:
    """All processes that have this cluster's state folder in their environment or work in it, whoever started them."""
    found = []
    mark = str(cluster.state_dir).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes() + os.readlink(folder / "cwd").encode()
        except OSError:
            continue  # it has just ended, or is not ours to read
        if mark in words:
            found.append(int(folder.name))
    return found


def longest_silence(stream: Stream, died_at: float) -> float:
    """Seconds from the death to the stream's next token; 0 when it had all."""
    return next((at - died_at for at in stream.arrived_at if at > died_at), 0.0)
