"""This checkout compared with another one, for example the state before a change: the same requests, in turn.

`python -m tests.measure checkout=FOLDER`: FOLDER is another checkout of noodle, after `make setup-dev` there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.measure.performance.engine import decode_rate, prompt_ids, whole_seconds
from tests.measure.report import GGML, TRANSFORMERS, Section, spread
from tests.support.models.real_model import real_model_folder
from tests.support.processes.cluster import Cluster, running_cluster

PAIRS = 7
PROMPT_TOKENS = 512
STREAMS = 8
# the same cut on both sides, so that a difference is one of code
FORMATS = {
    "q8_0": {"NOODLE_EXECUTOR": GGML, "NOODLE_WEIGHTS": "q8_0", "NOODLE_QUALITY": "stored"},
    "f32": {"NOODLE_EXECUTOR": TRANSFORMERS, "NOODLE_QUALITY": "exact"},
}


def measure(asked: str = "") -> Section:
    """Measure decode, prefill and many streams of both checkouts in turn; both clusters run at the same time."""
    other = Path(asked).resolve()
    if not asked or not (other / ".venv" / "bin" / "python").is_file():
        raise SystemExit(f"No checkout with a .venv in {asked or 'no folder'}: python -m tests.measure checkout=FOLDER")
    section = Section("checkout", "Before and after a change")
    section.say(
        f"SmolLM2-135M-Instruct over two stages of 16 and 14 layers; both checkouts run at once and answer in turn, "
        f"{PAIRS} pairs. Decode: one stream; prefill: the first token after {PROMPT_TOKENS}; ratios this checkout over "
        "the other one of the same pair, above 1 is faster."
    )
    rows = []
    for weights, chosen in FORMATS.items():
        variables = {"NOODLE_SPLIT": "16,14", "NOODLE_PREFIX_CACHE": "off", **chosen}
        with (
            tempfile.TemporaryDirectory() as scratch,
            running_cluster(Path(scratch) / "this", real_model_folder(), 2, **variables) as this,
            running_cluster(Path(scratch) / "other", real_model_folder(), 2, checkout=other, **variables) as that,
        ):
            rows += [[weights, *row] for row in compare(this, that)]
    section.table(["weights", "what", "this, tokens/s", "other, tokens/s", "ratio"], rows)
    return section


def compare(this: Cluster, that: Cluster) -> list[list[str]]:
    """Return one row for each kind of run."""
    runs: dict[str, Callable[[Cluster, int], float]] = {
        "decode": lambda cluster, _: decode_rate(cluster, 1),
        "prefill": lambda cluster, number: PROMPT_TOKENS / whole_seconds(cluster, prompt_ids(PROMPT_TOKENS, number), 1),
        f"{STREAMS} streams": lambda cluster, _: decode_rate(cluster, STREAMS),
    }
    rows = []
    for what, run in runs.items():
        for cluster in (this, that):
            run(cluster, 0)
        pairs = []
        for number in range(1, PAIRS + 1):
            order = (this, that) if number % 2 else (that, this)
            rates = {cluster: run(cluster, number) for cluster in order}
            pairs.append((rates[this], rates[that]))
        ratios = [ours / theirs for ours, theirs in pairs]
        ours, theirs = zip(*pairs, strict=True)
        rows.append([what, spread(ours, 1), spread(theirs, 1), f"**{statistics.median(ratios):.3f}**"])
    return rows
