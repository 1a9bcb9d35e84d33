"""The extra cost of a sampled token over a greedy one, at the real vocabulary's size."""

from __future__ import annotations

import statistics
import time

import numpy as np

from noodle.wire.messages import SamplingParameters
from services.stage.worker.sampler import sample
from tests.measure.report import Section

VOCABULARY = 49_152
ROUNDS = 300


def measure() -> Section:
    """Measure medians over synthetic logits: peaked as a model's are, and flat."""
    section = Section("sampling", "What drawing a token costs")
    section.say(f"{VOCABULARY} logits, one core, median of {ROUNDS} draws; allowed: 0.5 ms more than greedy.")
    generator = np.random.default_rng(0)
    shapes = {"peaked (spread 3)": 3.0, "very peaked (spread 6)": 6.0, "flat (spread 0.1)": 0.1}
    settings = {
        "temperature 0.8, top_p 0.95": SamplingParameters(0.8, 0.95, 0, 1),
        "temperature 1": SamplingParameters(1.0, 1.0, 0, 1),
        "temperature 1, top_k 50": SamplingParameters(1.0, 1.0, 50, 1),
    }
    rows = []
    for shape, spread in shapes.items():
        logits = (generator.standard_normal((8, VOCABULARY)) * spread).astype(np.float32)
        greedy = seconds(logits, SamplingParameters())
        for name, parameters in settings.items():
            drawn = seconds(logits, parameters)
            rows.append([shape, name, f"{greedy * 1e3:.3f}", f"{drawn * 1e3:.3f}", f"{(drawn - greedy) * 1e3:.3f}"])
    section.table(["logits", "drawn with", "greedy ms", "drawn ms", "more ms"], rows)
    return section


def seconds(logits: np.ndarray, parameters: SamplingParameters) -> float:
    """Return the median seconds of one draw."""
    taken = []
    for index in range(ROUNDS):
        start = time.perf_counter()
        sample(logits[index % len(logits)], parameters, index, with_logprob=False)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
