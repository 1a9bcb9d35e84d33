"""Clients of all kinds that send requests until they are stopped, and check how each request ends.

The load does not know what is killed: it only asks whether the coordinator died while a request was open, because then
a request that cannot be resumed may break.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.clients.event_reader import EventReader
from tests.support.clients.kill_runs import Stream
from tests.support.models.prompts import PROMPTS
from tests.support.processes.cluster import Services

REQUEST_SECONDS = 240.0  # a request that takes longer counts as hanging
RETRY_SECONDS = 0.2
RESUME_SECONDS = 120
DELETED_RESUME_SECONDS = 10  # if the coordinator died before it wrote down that a request was deleted
DELETED_SECONDS = 60.0
LONG_PROMPTS = tuple(PROMPTS[19] * 2 + text for text in PROMPTS[:3])  # about 800 tokens each
CHATS = (
    [{"role": "user", "content": "What is a home network?"}],
    [
        {"role": "user", "content": "What is a home network?"},
        {"role": "assistant", "content": "It joins the machines of one household."},
        {"role": "user", "content": "And what is a router?"},
    ],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why is ice slippery?"}],
)
KINDS = (
    "stream, taken up",
    "stream",
    "whole, by key",
    "whole",
    "chat, by key",
    "stream, left half-way",
    "stream, deleted half-way",
)


@dataclass(frozen=True)
class Asked:
    """A body and its answer in an undisturbed run: token ids, or a chat's text."""

    body: dict[str, Any]
    expected: Any
    is_chat: bool = False


def bodies() -> list[dict[str, Any]]:
    """Return bodies with short and long prompts, half greedy and half sampled with a seed."""
    prompts = [*PROMPTS[:10], *PROMPTS[17:], *LONG_PROMPTS]
    return [
        {
            "inputs": prompt,
            "parameters": {
                "max_new_tokens": 16 + index * 7 % 33,
                "ignore_eos": True,
                **({"temperature": 0.8, "top_p": 0.95, "seed": 100 + index} if index % 2 else {}),
            },
        }
        for index, prompt in enumerate(prompts)
    ]


def chat_bodies(model: str) -> list[dict[str, Any]]:
    """Return greedy chats of one and two turns."""
    return [{"model": model, "messages": turns, "max_tokens": 24, "temperature": 0} for turns in CHATS]


def asked_undisturbed(services: Services) -> list[Asked]:
    """Send all bodies now and return them with their answers."""
    model = services.get("/v1/models")[1]["data"][0]["id"]
    found = []
    for body in bodies():
        status, answer = services.post("/generate", body)
        assert status == 200, answer
        found.append(Asked(body, [token["id"] for token in answer["details"]["tokens"]]))
    for body in chat_bodies(model):
        status, answer = services.post("/v1/chat/completions", body)
        assert status == 200, answer
        found.append(Asked(body, answer["choices"][0]["message"]["content"], is_chat=True))
    return found


@dataclass
class Ledger:
    """What was sent and how it ended; written by all clients concurrently."""

    sent: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    refusals: int = 0  # 429 and 503 with a Retry-After, after which the client retried
    sent_again: int = 0  # streams lost before their first token, which the client sent again
    wrong: list[str] = field(default_factory=list)
    parted: list[tuple[Asked, Any]] = field(default_factory=list)  # with the answer received instead
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, outcome: str) -> None:
        """Count a request of this kind that has ended."""
        with self.lock:
            self.outcomes.setdefault(kind, Counter())[outcome] += 1
            if outcome.startswith("wrong"):
                self.wrong.append(f"{kind}: {outcome}")

    def compare(self, kind: str, asked: Asked, answered: Any) -> None:
        """Record an answer, and whether it differs from the expected one."""
        self.note(kind, "answered")
        if answered != asked.expected:
            with self.lock:
                self.parted.append((asked, answered))


class Load:
    """Clients, one thread each."""

    def __init__(
        self, services: Services, asked: list[Asked], coordinator_died_since: Callable[[float], bool], clients: int
    ) -> None:
        self._services, self._asked, self._died_since = services, asked, coordinator_died_since
        self.ledger = Ledger()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(clients)]

    def start(self) -> None:
        """Start all clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """Let all clients finish their request; return how many did not in time."""
        self._over.set()
        end = time.monotonic() + REQUEST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        count = 0
        while not self._over.is_set():
            kind = chance.choice(KINDS)
            asked = chance.choice([each for each in self._asked if each.is_chat == kind.startswith("chat")])
            name = f"client-{number}-{count}"
            count += 1
            with self.ledger.lock:
                self.ledger.sent[kind] += 1
            try:
                self._one(kind, asked, name)
            except Exception as error:  # noqa: BLE001  # a client that fails is what is looked for
                self.ledger.note(kind, f"wrong: {name}: {type(error).__name__}: {error}")

    def _one(self, kind: str, asked: Asked, name: str) -> None:
        if kind == "stream, taken up":
            self._taken_up(kind, asked, name)
        elif kind == "stream, deleted half-way":
            self._deleted(kind, asked, name)
        elif kind.startswith("stream"):
            self._streamed(kind, asked, leaves=kind.endswith("half-way"))
        else:
            self._whole(kind, asked, name if kind.endswith("by key") else "")

    def _taken_up(self, kind: str, asked: Asked, name: str) -> None:
        stream = Stream(self._services, with_parameters(asked.body, resume_seconds=RESUME_SECONDS), name)
        stream.run()
        with self.ledger.lock:
            self.ledger.sent_again += stream.sent_again
        if stream.failure:
            self.ledger.note(kind, f"wrong: {name}: {stream.failure}")
        else:
            self.ledger.compare(kind, asked, stream.tokens)

    def _streamed(self, kind: str, asked: Asked, *, leaves: bool) -> None:
        """Read a stream that cannot be resumed; it may break only if the coordinator dies."""
        end = time.monotonic() + REQUEST_SECONDS
        while time.monotonic() < end:
            began_at = time.monotonic()
            tokens: list[int] = []
            try:
                with EventReader(self._services.port, "POST", "/generate_stream", asked.body) as reader:
                    if self._is_refused(reader.status, reader.retry_after):
                        continue
                    for _, event in reader:
                        if "error" in event:
                            raise AssertionError(event["error"]["message"])
                        tokens.append(event["token"]["id"])
                        if leaves and len(tokens) >= len(asked.expected) // 2:
                            self.ledger.note(kind, "left")
                            return
            except ConnectionRefusedError:
                time.sleep(RETRY_SECONDS)  # it was not sent
                continue
            except (OSError, http.client.HTTPException):
                tokens = []
            if len(tokens) == len(asked.expected):
                self.ledger.compare(kind, asked, tokens)
            else:
                self._note_broken(kind, began_at)
            return
        self.ledger.note(kind, "wrong: it could not be sent in time")

    def _whole(self, kind: str, asked: Asked, key: str) -> None:
        """Ask for a whole answer; with an idempotency key, retry until it is answered."""
        path = "/v1/chat/completions" if asked.is_chat else "/generate"
        headers = {"Idempotency-Key": key} if key else {}
        end = time.monotonic() + REQUEST_SECONDS
        while time.monotonic() < end:
            began_at = time.monotonic()
            try:
                status, answer, retry_after = ask(self._services.port, path, asked.body, headers)
            except ConnectionRefusedError:
                time.sleep(RETRY_SECONDS)
                continue
            except (OSError, http.client.HTTPException):
                if key:
                    time.sleep(RETRY_SECONDS)
                    continue
                self._note_broken(kind, began_at)
                return
            if self._is_refused(status, retry_after):
                continue
            if status != 200:
                self.ledger.note(kind, f"wrong: {status} {answer}")
            elif asked.is_chat:
                self.ledger.compare(kind, asked, answer["choices"][0]["message"]["content"])
            else:
                self.ledger.compare(kind, asked, [token["id"] for token in answer["details"]["tokens"]])
            return
        self.ledger.note(kind, "wrong: not answered in time")

    def _deleted(self, kind: str, asked: Asked, name: str) -> None:
        """Read half of a stream, delete the request by its id, and wait until it no longer runs."""
        body = with_parameters(asked.body, resume_seconds=DELETED_RESUME_SECONDS)
        end = time.monotonic() + REQUEST_SECONDS
        while time.monotonic() < end:
            try:
                with EventReader(
                    self._services.port, "POST", "/generate_stream", body, X_Request_Id=name, Idempotency_Key=name
                ) as reader:
                    if self._is_refused(reader.status, reader.retry_after):
                        continue
                    reader.take(len(asked.expected) // 2)
            except (OSError, http.client.HTTPException):
                time.sleep(RETRY_SECONDS)
                continue
            break
        self._until(lambda: self._answers("DELETE", name)[0] in (200, 404))
        self._until(lambda: self._answers("GET", name)[1] != "running")
        self.ledger.note(kind, "deleted")

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DELETED_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if condition():
                    return
            time.sleep(RETRY_SECONDS)
        raise AssertionError("it still runs though it was deleted")

    def _answers(self, method: str, name: str) -> tuple[int, str]:
        """Return the HTTP status and the request's own status."""
        status, answer, _ = ask(self._services.port, f"/v1/requests/{name}", None, {}, method)
        return status, str(answer.get("status", ""))

    def _is_refused(self, status: int, retry_after: str) -> bool:
        """Return whether the client must retry, after waiting for a moment."""
        if status not in (429, 503):
            return False
        assert retry_after.isdecimal(), f"{status} without a Retry-After"
        with self.ledger.lock:
            self.ledger.refusals += 1
        time.sleep(min(int(retry_after), 1.0))
        return True

    def _note_broken(self, kind: str, began_at: float) -> None:
        excused = self._died_since(began_at)
        self.ledger.note(kind, "broken with the coordinator" if excused else "wrong: the connection broke")


def with_parameters(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a /generate body with further parameters."""
    return {**body, "parameters": {**body["parameters"], **more}}


def ask(port: int, path: str, body: Any, headers: dict[str, str], method: str = "POST") -> tuple[int, Any, str]:
    """Return status, decoded answer and Retry-After of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.getheader("Retry-After") or ""
    finally:
        connection.close()
