"""Requests that run while a process is killed, and clients that reconnect for the rest of their streams."""

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
RUN_SECONDS = 240.0  # for all requests of one run to end
RETRY_SECONDS = 0.1  # between two reconnects of a client
SECOND_DEATH_SECONDS = 2.0  # from Valkey's death to the coordinator's

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
    """One request and its client, which records each token with its time and reconnects as often as needed."""

    services: Services
    body: dict[str, Any]
    request_id: str
    tokens: list[int] = field(default_factory=list)
    arrived_at: list[float] = field(default_factory=list)
    breaks: int = 0
    failure: str = ""
    is_accepted: bool = False
    sent_again: int = 0  # accepted, then lost before its first token

    def run(self) -> None:
        """Read the stream to its end; fail if a token is repeated or out of order."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            try:
                if self._read():
                    return
            except (OSError, http.client.HTTPException):
                pass  # the peer has died: reconnect below
            self.breaks += 1
            time.sleep(RETRY_SECONDS)
        self.failure = self.failure or "not finished in time"

    def _read(self) -> bool:
        """Read from one connection; return whether the request has ended."""
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
    """Return ids and bodies: half are greedy, half sampled with a seed."""
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
    """Run all streams at once; call `kill` when together they have `kill_after` tokens."""
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
    """Choose the number of tokens, of all streams together, after which to kill."""
    return chance.randrange(STREAMS, STREAMS * NEW_TOKENS // 2)


def killer(cluster: Cluster, kind: str) -> Callable[[], None]:
    """Return a function that sends SIGKILL to all processes of this kind."""

    def kill_services(names: Sequence[str]) -> None:
        pids = [pid for name in names for pid in pids_of(cluster, name)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # a worker may end as soon as its master is gone

    def kill() -> None:
        if kind == "valkey, then the coordinator":
            kill_services(["valkey"])
            threading.Event().wait(SECOND_DEATH_SECONDS)
            kill_services(["coordinator"])
        else:
            kill_services(SERVICES_OF[kind])

    return kill


def pids_of(cluster: Cluster, name: str) -> list[int]:
    """Return the process ids of a service and its children."""
    master = cluster.service_pid(name)
    try:
        children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []
    return [master, *map(int, children)]


def processes_of(cluster: Cluster) -> list[int]:
    """Return every process whose environment or working directory names this cluster's state folder."""
    found = []
    mark = str(cluster.state_dir).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes() + os.readlink(folder / "cwd").encode()
        except OSError:
            continue  # it has just ended, or is not readable
        if mark in words:
            found.append(int(folder.name))
    return found


def longest_silence(stream: Stream, died_at: float) -> float:
    """Return the seconds from the kill to the stream's next token, 0 if it had all tokens."""
    return next((at - died_at for at in stream.arrived_at if at > died_at), 0.0)
