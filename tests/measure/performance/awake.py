"""One stream over two stages of one core each: cores that may sleep between its tokens, and such that stay awake."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.measure.performance.engine import streams_of
from tests.measure.performance.speed import pin_stages
from tests.measure.report import TRANSFORMERS, Section, named, spread, title_of
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster, running_cluster

PAIRS = 15
NEW_TOKENS = 40
WAYS = ("off", "on")  # of NOODLE_STAY_AWAKE


def measure(executor: str = TRANSFORMERS) -> Section:
    """All clusters stand at the same time and compute in turn, in float32 by this executor."""
    section = Section(named("awake", executor), title_of("A core that stays awake", executor))
    folder, cores = real_model_folder(), sorted(os.sched_getaffinity(0))[:2]
    clusters: dict[tuple[str, int], Cluster] = {}
    intervals: dict[tuple[str, int], list[list[float]]] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for way, stages in itertools.product(WAYS, (1, 2)):
            variables = {"NOODLE_EXECUTOR": executor, "NOODLE_STAY_AWAKE": way}
            cluster = stack.enter_context(running_cluster(scratch / f"{way}{stages}", folder, stages, **variables))
            pin_stages(cluster, cores[:stages])
            token_seconds(cluster)
            clusters[way, stages], intervals[way, stages] = cluster, []
        for _ in range(PAIRS):
            for kind, cluster in clusters.items():
                intervals[kind].append(token_seconds(cluster))
    section.say(
        f"SmolLM2-135M-Instruct, float32, stages of one core each; one stream of {NEW_TOKENS} new tokens, {PAIRS} "
        "rounds in turn. Between two tokens, of all rounds; two stages against one by the means of each round."
    )
    section.table(
        ["NOODLE_STAY_AWAKE", "stages", "a quarter below, ms", "median, ms", "a tenth above, ms", "mean, ms"],
        [[way, stages, *figures(intervals[way, stages])] for way, stages in clusters],
    )
    for way in WAYS:
        pairs = zip(intervals[way, 1], intervals[way, 2], strict=True)
        ratios = [statistics.mean(one) / statistics.mean(two) for one, two in pairs]
        section.say(f"NOODLE_STAY_AWAKE={way}: two stages {spread(ratios)} of the tokens/s of one.")
        section.say()
    return section


def figures(rounds: list[list[float]]) -> list[str]:
    """Quarter, median, nine tenths and mean of all rounds' intervals."""
    seconds = sorted(itertools.chain(*rounds))
    chosen = [seconds[int(len(seconds) * share)] for share in (0.25, 0.5, 0.9)]
    return [f"{each * 1e3:.1f}" for each in (*chosen, statistics.mean(seconds))]


def token_seconds(cluster: Cluster) -> list[float]:
    """Between the tokens of one stream."""
    (times,) = streams_of(cluster, 1, NEW_TOKENS)
    return [right - left for left, right in itertools.pairwise(times)]
