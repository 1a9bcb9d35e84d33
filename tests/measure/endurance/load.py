"""200 requests, 8 at a time: streamed, whole, and cancelled half-way; all must end, and memory must not grow."""

from __future__ import annotations

import http.client
import json
import queue
import random
import tempfile
import threading
import time
from pathlib import Path

from tests.measure.endurance.memory import proportional_bytes, yes
from tests.measure.report import Section
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster, running_cluster, wait_until

REQUESTS = 200
AT_ONCE = 8
KINDS = ("whole", "stream", "cancelled stream", "cancelled whole")
PATIENCE_SECONDS = 0.1  # of a client that leaves before its whole answer arrives
REQUEST_SECONDS = 120.0  # a request that takes longer counts as hanging
ROUND_SECONDS = 1200.0
EMPTY_SECONDS = 30.0  # from the last answer until no stage holds KV rows
GROWTH_ALLOWED = 0.05  # growth of a process from the first to the second round: kept by the allocator


def measure() -> Section:
    """Run two rounds on two stages of the real model; fail if a request does not end or KV rows are left."""
    section = Section("load", "200 requests, 8 at a time")
    section.say(
        "Two stages, real model, prompts of 5 to 60 tokens, 8 to 40 new ones; a quarter each whole, streamed, "
        "streamed and cancelled half-way, whole and cancelled by a client that leaves. Memory is Pss_Anon after each "
        f"round; allowed to grow by {GROWTH_ALLOWED:.0%} from the first to the second."
    )
    names = ("coordinator", "stage-0", "stage-1")
    rows: list[list[object]] = []
    memory: list[list[int]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(Path(scratch) / "s", real_model_folder(), 2) as cluster,
    ):
        for number in (1, 2):
            start = time.monotonic()
            ended = one_round(cluster, random.Random(number))
            seconds = time.monotonic() - start
            wait_until(lambda: cluster.kv_bytes_held() == 0, EMPTY_SECONDS, "no KV rows are held")
            memory.append([proportional_bytes(cluster.worker_pid(name)) for name in names])
            rows.append(
                [number, sum(ended.values()), ", ".join(f"{kind} {ended[kind]}" for kind in KINDS), f"{seconds:.0f}",
                 cluster.kv_bytes_held(), *(f"{taken / 1e6:.0f} MB" for taken in memory[-1])]
            )  # fmt: skip
    within = [second <= first * (1 + GROWTH_ALLOWED) for first, second in zip(*memory, strict=True)]
    rows.append(["within", "", "", "", "", *(yes(each) for each in within)])
    section.table(["round", "ended", "of them", "seconds", "KV bytes after", *names], rows)
    return section


def one_round(cluster: Cluster, chance: random.Random) -> dict[str, int]:
    """Run all requests and count those that ended, by kind; fail if one does not end."""
    work: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    for index in range(REQUESTS):
        work.put((KINDS[index % len(KINDS)], chance.randrange(5, 60), chance.randrange(8, 40)))
    ended = dict.fromkeys(KINDS, 0)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def serve() -> None:
        while not errors:
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

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + ROUND_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), f"a round takes more than {ROUND_SECONDS:.0f} seconds"
    return ended


def one_request(cluster: Cluster, kind: str, prompt: int, new: int) -> None:
    """Send one request of a kind on its own connection."""
    path = "/generate_stream" if "stream" in kind else "/generate"
    body = {"inputs": list(range(300, 300 + prompt)), "parameters": {"max_new_tokens": new, "ignore_eos": True}}
    end = time.monotonic() + REQUEST_SECONDS
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=REQUEST_SECONDS)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        if kind == "cancelled whole":
            time.sleep(PATIENCE_SECONDS)
            return
        response = connection.getresponse()
        text = b""
        tokens = 0
        while line := response.readline():
            text += line
            tokens += line.startswith(b"data:")
            assert time.monotonic() < end, f"a request of {new} tokens takes more than {REQUEST_SECONDS:.0f} seconds"
            if kind == "cancelled stream" and tokens >= new // 2:
                return
        assert response.status == 200, text
        if kind == "whole":
            tokens = json.loads(text)["details"]["generated_tokens"]
        assert tokens == new, (kind, tokens, new, text[-500:])
    finally:
        connection.close()
