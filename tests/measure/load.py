"""200 requests, 8 at a time, streaming, whole, and cancelled half-way: all end, nothing stays, nothing grows."""

from __future__ import annotations

import http.client
import json
import queue
import random
import tempfile
import threading
import time
from pathlib import Path

from tests.measure.memory import proportional_bytes
from tests.measure.report import Section
from tests.support.cluster import Cluster, running_cluster, wait_until
from tests.support.real_model import real_model_folder

REQUESTS = 200
AT_ONCE = 8
KINDS = ("whole", "stream", "cancelled stream", "cancelled whole")
EMPTY_SECONDS = 30.0


def measure() -> Section:
    """Two rounds on two stages of the real model."""
    section = Section("load", "200 requests, 8 at a time")
    section.say(
        "Two stages, real model, prompts of 5 to 60 tokens, 8 to 40 new ones; a quarter each whole, streamed, "
        "streamed and cancelled half-way, whole and cancelled by a client that leaves."
    )
    rows = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(Path(scratch) / "s", real_model_folder(), 2) as cluster,
    ):
        for number in (1, 2):
            start = time.monotonic()
            ended = one_round(cluster, random.Random(number))
            seconds = time.monotonic() - start
            wait_until(lambda: cluster.kv_bytes_held() == 0, EMPTY_SECONDS, "no KV rows are held")
            memory = [proportional_bytes(cluster.worker_pid(name)) for name in ("coordinator", "stage-0", "stage-1")]
            rows.append(
                [number, sum(ended.values()), ", ".join(f"{kind} {ended[kind]}" for kind in KINDS), f"{seconds:.0f}",
                 cluster.kv_bytes_held(), *(f"{taken / 1e6:.0f} MB" for taken in memory)]
            )  # fmt: skip
    section.table(["round", "ended", "of them", "seconds", "KV bytes after", "coordinator", "stage 0", "stage 1"], rows)
    return section


def one_round(cluster: Cluster, chance: random.Random) -> dict[str, int]:
    """Run all requests; counts how many ended, by kind. A request that does not end fails the measurement."""
    work: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    for index in range(REQUESTS):
        work.put((KINDS[index % len(KINDS)], chance.randrange(5, 60), chance.randrange(8, 40)))
    ended = dict.fromkeys(KINDS, 0)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def serve() -> None:
        while True:
            try:
                kind, prompt, new = work.get_nowait()
            except queue.Empty:
                return
            try:
                one_request(cluster, kind, prompt, new)
            except BaseException as error:  # noqa: BLE001  # told below, in the main thread
                errors.append(error)
                return
            with lock:
                ended[kind] += 1

    threads = [threading.Thread(target=serve) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return ended


def one_request(cluster: Cluster, kind: str, prompt: int, new: int) -> None:
    """One request of a kind, on a connection of its own."""
    path = "/generate_stream" if "stream" in kind else "/generate"
    body = {"inputs": list(range(300, 300 + prompt)), "parameters": {"max_new_tokens": new, "ignore_eos": True}}
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=120)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    if kind == "cancelled whole":
        time.sleep(0.1)  # a client that loses patience
        connection.close()
        return
    response = connection.getresponse()
    assert response.status == 200
    events = 0
    while line := response.readline():
        events += line.startswith(b"data:")
        if kind == "cancelled stream" and events >= new // 2:
            break
    connection.close()
    if kind == "stream":
        assert events == new
