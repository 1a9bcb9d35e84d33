"""Two machines in containers: image sizes, time to ready, and tokens per second compared with plain processes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.engine.engine import CONTROL, STAGE, build, docker, require_base_images
from tests.engine.pair import FIRST_CUT, Pair, two_machines
from tests.measure.performance.speed import pin
from tests.measure.report import Section, spread
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster, request, running_cluster

PAIRS = 7
NEW_TOKENS = 96
PROMPT = "The river comes down from the hills and"
CORE_OF_A, CORE_OF_B = 0, 1
ALLOWED_RATIO = 0.95


def measure() -> Section:
    """Measure; fail if containers compute other tokens than processes."""
    section = Section("containers", "Containers")
    folder = real_model_folder()
    require_base_images()
    rows = []
    for target, tag in (("control", CONTROL), ("stage", STAGE)):
        seconds = []
        for _ in range(2):  # the second build finds everything in the engine's cache
            began = time.monotonic()
            build("Dockerfile.cpu", target, tag)
            seconds.append(time.monotonic() - began)
        size = int(json.loads(docker("image", "inspect", tag))[0]["Size"])
        rows.append([target, f"{size / 1e9:.2f} GB", f"{seconds[0]:.1f}", f"{seconds[1]:.1f}"])
    section.say("Images; built with what the cache had, and again.")
    section.table(["image", "size", "seconds", "again"], rows)
    with tempfile.TemporaryDirectory() as scratch, two_machines(Path(scratch)) as pair:
        pair.b.up()
        pair.a.up()
        section.say(f"B up, then A up with empty volumes until ready: {pair.a.wait_ready():.1f} s.")
        with running_cluster(Path(scratch) / "state", folder, 2, NOODLE_SPLIT=FIRST_CUT) as processes:
            _pin(processes)
            _compare(section, pair, processes)
    return section


def _compare(section: Section, pair: Pair, processes: Cluster) -> None:
    sides = {"containers": (pair.a.port, pair.a.api_key), "processes": (processes.port, "")}
    tokens = {name: _generate(*side)[0] for name, side in sides.items()}  # also warms both
    assert tokens["containers"] == tokens["processes"]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(PAIRS):
        for name in sides if number % 2 else reversed(sides):
            rates[name].append(_generate(*sides[name])[1])
    ratios = [one / other for one, other in zip(rates["containers"], rates["processes"], strict=True)]
    section.say(
        f"Two machines in containers, a core and a network each, against two stages of `noodle up` on the same cores: "
        f"one stream, {NEW_TOKENS} tokens, {PAIRS} pairs of runs in turn, the other side idle. The tokens are the same."
    )
    section.table(["", "tokens per second"], [[name, spread(values)] for name, values in rates.items()])
    median = statistics.median(ratios)
    verdict = "yes" if median >= ALLOWED_RATIO else "no"
    section.say(f"Ratio: **{spread(ratios, 3)}**; at least {ALLOWED_RATIO}: {verdict}.")


def _generate(port: int, key: str) -> tuple[list[int], float]:
    """Return token ids, and tokens per second of the whole answer."""
    parameters = {"max_new_tokens": NEW_TOKENS, "details": True, "ignore_eos": True}
    began = time.monotonic()
    status, answer = request(port, "POST", "/generate", {"inputs": PROMPT, "parameters": parameters}, token=key)
    seconds = time.monotonic() - began
    assert status == 200, answer
    return [int(token["id"]) for token in answer["details"]["tokens"]], NEW_TOKENS / seconds


def _pin(processes: Cluster) -> None:
    """Pin machine A's services to one core and stage 1 to the other, as the containers are."""
    cores = {"stage-1": CORE_OF_B, **dict.fromkeys(("valkey", "planner", "coordinator", "stage-0"), CORE_OF_A)}
    for name, core in cores.items():
        pin(processes.service_pid(name) if name == "valkey" else processes.worker_pid(name), core)
