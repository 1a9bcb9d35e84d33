"""Little room for KV rows, and more requests than the limits admit: all are served or refused cleanly."""

from __future__ import annotations

import http.client
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.model.files import read_config
from tests.measure.correctness.kills import EMPTY_SECONDS
from tests.measure.report import Section
from tests.support.clients.mixed_load import ask
from tests.support.models.equality import TIE_GAP, first_difference
from tests.support.models.prompts import PROMPTS
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import Cluster, running_cluster, wait_until

TIGHT_REQUESTS = 20
TIGHT_PROMPT_TOKENS = 32
TIGHT_NEW_TOKENS = 48
TIGHT_SHARE = 10  # the room, as a share of what all requests need together
LAYERS = 15  # of each of the two stages
FLOAT_BYTES = 4

OVERLOAD_REQUESTS = 500
OVERLOAD_NEW_TOKENS = 8
OVERLOAD_SECONDS = 600.0  # a request that takes longer counts as hanging
HEALTH_EVERY_SECONDS = 0.25


def measure_tight() -> Section:
    """Measure the same requests with full KV room, with a tenth of it, and each alone."""
    section = Section("tight", "A tenth of the room for KV rows")
    folder = real_model_folder()
    wanted = TIGHT_REQUESTS * (TIGHT_PROMPT_TOKENS + TIGHT_NEW_TOKENS)
    room = wanted // TIGHT_SHARE
    section.say(
        f"SmolLM2-135M-Instruct, float32, two stages of {LAYERS} layers and one thread; {TIGHT_REQUESTS} requests at "
        f"once, {TIGHT_PROMPT_TOKENS} tokens and {TIGHT_NEW_TOKENS} new ones each, half greedy and half drawn with a "
        f"seed: {wanted} KV rows. NOODLE_KV_BYTES gives room for {room}. Equal: the tokens that each gets alone; tied: "
        f"the first other token stands where the two best logits are closer than {TIE_GAP:g}."
    )
    asked = tight_bodies()
    variables = {"NOODLE_SPLIT": f"{LAYERS},{LAYERS}"}
    narrow = {"NOODLE_KV_BYTES": str(room * kv_bytes_per_token(folder))}
    found: list[tuple[str, list[list[int]], float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        with running_cluster(Path(scratch) / "wide", folder, 2, **variables) as cluster:
            alone = [tokens_of(cluster, body) for body in asked]
            found.append(("all that is wanted", *at_once(cluster, asked)))
        with running_cluster(Path(scratch) / "narrow", folder, 2, **variables, **narrow) as cluster:
            found.append((f"{room} rows", *at_once(cluster, asked)))
            wait_until(cluster.is_empty, EMPTY_SECONDS, "only kept KV rows are left")
    whole = WholeModel(folder)
    rows = []
    for name, answers, seconds, preemptions in found:
        parted = [
            (body, tokens, first_difference(tokens, got))
            for body, tokens, got in zip(asked, alone, answers, strict=True)
            if tokens != got
        ]
        tied = sum(
            "seed" not in body["parameters"] and whole.best_two_gap([*body["inputs"], *tokens[:at]]) < TIE_GAP
            for body, tokens, at in parted
        )
        rate = f"{TIGHT_REQUESTS * TIGHT_NEW_TOKENS / seconds:.0f}"
        rows.append([name, len(answers), len(answers) - len(parted), tied, int(preemptions), f"{seconds:.1f}", rate])
    section.table(["room", "answered", "equal", "tied", "preemptions", "seconds", "new tokens/s"], rows)
    return section


def tight_bodies() -> list[dict[str, Any]]:
    """Return bodies whose prompts share no prefix."""
    return [
        {
            "inputs": [
                1000 + number,
                *(1000 + (number * 7919 + index * 31) % 40_000 for index in range(1, TIGHT_PROMPT_TOKENS)),
            ],
            "parameters": {
                "max_new_tokens": TIGHT_NEW_TOKENS,
                "ignore_eos": True,
                **({"temperature": 0.8, "top_p": 0.95, "seed": 300 + number} if number % 2 else {}),
            },
        }
        for number in range(TIGHT_REQUESTS)
    ]


def kv_bytes_per_token(folder: Path) -> int:
    """Return the KV bytes of one token on one stage."""
    config = read_config(folder)
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(LAYERS * 2 * config["num_key_value_heads"] * head_size * FLOAT_BYTES)


def tokens_of(cluster: Cluster, body: dict[str, Any]) -> list[int]:
    """Return the token ids of a whole answer; fail if it is refused."""
    status, answer = cluster.post("/generate", body)
    assert status == 200, answer
    return [token["id"] for token in answer["details"]["tokens"]]


def at_once(cluster: Cluster, asked: Sequence[dict[str, Any]]) -> tuple[list[list[int]], float, float]:
    """Return all answers, the seconds they took, and the number of preempted sessions."""
    answers: dict[int, list[int]] = {}

    def one(number: int, body: dict[str, Any]) -> None:
        answers[number] = tokens_of(cluster, body)

    before = cluster.metric(cluster.port, "noodle_preemptions_total")
    began_at = time.monotonic()
    threads = [threading.Thread(target=one, args=each) for each in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(OVERLOAD_SECONDS)
        assert not thread.is_alive(), "a request hangs"
    seconds = time.monotonic() - began_at
    time.sleep(0.5)  # metrics are updated at each tick
    preemptions = cluster.metric(cluster.port, "noodle_preemptions_total") - before
    return [answers[number] for number in range(len(asked))], seconds, preemptions


@dataclass
class Ended:
    """How one of many requests at once ended."""

    status: int
    seconds: float
    retry_after: str
    new_tokens: int


def measure_overload() -> Section:
    """Measure many requests sent at the same moment."""
    section = Section("overload", f"{OVERLOAD_REQUESTS} requests at once")
    section.say(
        f"SmolLM2-135M-Instruct, float32, two stages of one thread; {OVERLOAD_REQUESTS} clients at the same moment, "
        f"prompts of 5 to 12 tokens, {OVERLOAD_NEW_TOKENS} new ones, the limits as they are by default (64 computed, "
        "128 waiting). Meanwhile somebody asks for /health four times a second."
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(Path(scratch) / "s", real_model_folder(), 2) as cluster,
    ):
        ended, health = overload(cluster, OVERLOAD_REQUESTS)
        wait_until(cluster.is_empty, EMPTY_SECONDS, "only kept KV rows are left")
    rows = []
    for status in sorted({each.status for each in ended}):
        those = [each for each in ended if each.status == status]
        seconds = sorted(each.seconds for each in those)
        times = (statistics.median(seconds), seconds[int(0.95 * (len(seconds) - 1))], seconds[-1])
        told = sum(each.retry_after.isdecimal() for each in those)
        name = status or "connection broken or never answered"
        rows.append([name, len(those), *(f"{value:.2f}" for value in times), told if status != 200 else ""])
    section.table(["status", "requests", "median s", "95th", "worst", "with Retry-After"], rows)
    whole = sum(each.new_tokens == OVERLOAD_NEW_TOKENS for each in ended)
    section.say(
        f"Answers with all {OVERLOAD_NEW_TOKENS} tokens: {whole}. /health meanwhile: {len(health)} answers, median "
        f"{statistics.median(health) * 1e3:.0f} ms, worst {max(health) * 1e3:.0f} ms."
    )
    return section


def overload(cluster: Cluster, requests: int) -> tuple[list[Ended], list[float]]:
    """Send all requests at once; return how each ended, and the seconds of each /health request meanwhile."""
    ended: list[Ended] = []
    health: list[float] = []
    everybody = threading.Barrier(requests)
    over = threading.Event()

    def one(number: int) -> None:
        body = {
            "inputs": PROMPTS[number % 5],
            "parameters": {"max_new_tokens": OVERLOAD_NEW_TOKENS, "ignore_eos": True},
        }
        everybody.wait()
        began_at = time.monotonic()
        try:
            status, answer, retry_after = ask(cluster.port, "/generate", body, {})
        except (OSError, http.client.HTTPException, ValueError):
            ended.append(Ended(0, time.monotonic() - began_at, "", 0))
            return
        new_tokens = answer["details"]["generated_tokens"] if status == 200 else 0
        ended.append(Ended(status, time.monotonic() - began_at, retry_after, new_tokens))

    def look() -> None:
        while not over.wait(HEALTH_EVERY_SECONDS):
            began_at = time.monotonic()
            assert cluster.get("/health")[0] == 200
            health.append(time.monotonic() - began_at)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(requests)]
    looker = threading.Thread(target=look)
    looker.start()
    for thread in threads:
        thread.start()
    end = time.monotonic() + OVERLOAD_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    over.set()
    looker.join()
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
    return ended, health
