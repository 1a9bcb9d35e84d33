"""One stream over two stages of one core each, compared in turn with generate() of transformers on one core."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.measure.report import Section, spread
from tests.support.models.prompts import PROMPTS
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import Cluster, running_cluster

PAIRS = 9
PROMPT_TOKENS = 100
NEW_TOKENS = 96


def pin(process: int, core: int) -> None:
    """Pin a process with all its threads to one core."""
    for task in os.listdir(f"/proc/{process}/task"):
        os.sched_setaffinity(int(task), {core})


def pin_stages(cluster: Cluster, cores: Sequence[int]) -> None:
    """Pin each stage of a cluster to its own core, in order."""
    for index, core in enumerate(cores):
        pin(cluster.worker_pid(f"stage-{index}"), core)


def measure() -> Section:
    """Measure ratios of consecutive runs; the machine drifts, so only pairs are compared."""
    section = Section("speed", "One stream over two stages")
    folder = real_model_folder()
    cores = sorted(os.sched_getaffinity(0))[:2]
    section.say(
        f"A prompt of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones, end of text ignored, float32; two stages of one "
        f"core each, against transformers' `generate()` on one core; {PAIRS} pairs in turn, whole requests timed."
    )
    whole = WholeModel(folder)
    prompt_ids = whole.tokenizer(PROMPTS[-1]).input_ids[:PROMPT_TOKENS]
    ratios, ours, theirs = [], [], []
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(Path(scratch) / "s", folder, 2, NOODLE_PREFIX_CACHE="off") as cluster,
    ):
        pin_stages(cluster, cores)
        run_ours(cluster, prompt_ids)
        run_theirs(whole, prompt_ids, cores[0])
        before = overhead_counts(cluster)
        for _ in range(PAIRS):
            ours.append(NEW_TOKENS / run_ours(cluster, prompt_ids))
            theirs.append(NEW_TOKENS / run_theirs(whole, prompt_ids, cores[0]))
            ratios.append(ours[-1] / theirs[-1])
        after = overhead_counts(cluster)
        plan = cluster.get("/health")[1]["stages"]
    layers = " and ".join(str(stage["layers"][1] - stage["layers"][0]) for stage in plan)
    section.table(
        ["", "tokens/s: median (least to most)"],
        [[f"noodle, {layers} layers", spread(ours)], ["transformers generate()", spread(theirs)]],
    )
    section.say(f"Ratio: median **{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f}).")
    section.say()
    median = median_of_histogram([(bound, after[bound] - before[bound]) for bound in after])
    section.say(f"What a token costs beyond the stages' own compute: median **{median * 1e3:.2f} ms**.")
    return section


def run_ours(cluster: Cluster, prompt_ids: list[int]) -> float:
    """Return the seconds of one request."""
    start = time.monotonic()
    answer = cluster.generate(prompt_ids, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert answer["details"]["generated_tokens"] == NEW_TOKENS
    return time.monotonic() - start


def run_theirs(whole: WholeModel, prompt_ids: list[int], core: int) -> float:
    """Return the seconds of one generate() on one core."""
    everywhere = os.sched_getaffinity(0)
    pin(os.getpid(), core)
    try:
        start = time.monotonic()
        assert len(whole.generate(prompt_ids, NEW_TOKENS, ignore_end=True)) == NEW_TOKENS
        return time.monotonic() - start
    finally:
        for task in os.listdir(f"/proc/{os.getpid()}/task"):
            os.sched_setaffinity(int(task), everywhere)


def overhead_counts(cluster: Cluster) -> dict[float, float]:
    """Return the coordinator's histogram of a token's overhead: upper bound to count."""
    _, text = cluster.get("/metrics", cluster.token)
    counts = {}
    for line in text.decode().splitlines():
        if line.startswith("noodle_token_overhead_seconds_bucket"):
            counts[float(line.split('le="')[1].split('"')[0])] = float(line.rsplit(" ", 1)[1])
    return counts


def median_of_histogram(cumulative: list[tuple[float, float]]) -> float:
    """Return the median by linear interpolation in its bucket, as Prometheus does."""
    half = cumulative[-1][1] / 2
    lower, below = 0.0, 0.0
    for bound, count in cumulative:
        if count >= half:
            return lower + (bound - lower) * (half - below) / max(count - below, 1e-9)
        lower, below = bound, count
    return lower
