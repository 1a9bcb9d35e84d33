"""What a layer costs: predicted from the header and the machine's speed, and by steps of the layers themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from noodle.model.configs.completed import completed_config
from noodle.model.files import read_config, read_tensor_entries
from noodle.model.local import served_name
from noodle.model.quantization import held_tensors
from services.stage.executors.candidate import Candidate
from services.stage.executors.ggml.backend import CPU
from services.stage.executors.load import load_by
from services.stage.selection.benchmark import SliceTimer, seconds_per_layer
from services.stage.selection.layer_costs import (
    CONTEXT_TOKENS,
    ROW_COUNTS,
    LayerSeconds,
    ModelWeights,
    layer_seconds,
    model_weights,
)
from services.stage.selection.machine_speed import SpeedMeter
from tests.measure.report import Section
from tests.support.models.real_model import real_model_file

FORMATS = ("stored", "q8_0")
FURTHER_LAYERS = 8
ROUNDS = 12  # of a step, of which the fastest counts
CONTEXT_LENGTH = 2048


def measure(asked: str = "") -> Section:
    """Compare the default model's costs, or those of the files that `asked` names with commas between."""
    section = Section("costs", "What a layer costs")
    models = [Path(name) for name in asked.split(",")] if asked else [real_model_file()]
    section.say(
        "Predicted from the model's header and this machine's speed, and measured by steps of one layer and of "
        f"{1 + FURTHER_LAYERS}. One thread, whose processor time counts, so that other load on the machine does not; "
        "the fastest of a few rounds. Milliseconds, predicted over measured in brackets: a layer for one token, for "
        f"each token of {ROW_COUNTS[1]} sessions in one step, for each token of a chunk of {ROW_COUNTS[2]}; head with "
        "sampling."
    )
    with mock.patch.object(time, "perf_counter", time.process_time):
        rows = [compare(model, weights) for model in models for weights in FORMATS]
    section.table(["model", "weights", "types", "one token", "4 sessions", "prompt", "head"], rows)
    return section


def compare(model: Path, weights: str) -> list[str]:
    """Return one row of the table."""
    config = completed_config(read_config(model))
    layer_count = int(config["num_hidden_layers"])
    tensors = held_tensors(config, read_tensor_entries(model))
    matrices = model_weights(config, tensors, layer_count).in_format(weights)
    predicted, measured = predict(matrices), steps_of(model, weights, layer_count)
    pairs = [
        (predicted.decode_layer_seconds, measured.decode_layer_seconds),
        (predicted.batched_layer_seconds, measured.batched_layer_seconds),
        (predicted.prefill_layer_seconds_per_token, measured.prefill_layer_seconds_per_token),
        (predicted.head_decode_seconds, measured.head_decode_seconds),
    ]
    cells = [f"{1e3 * one:.3g} / {1e3 * other:.3g} ({one / other:.2f})" for one, other in pairs]
    return [served_name(model), weights, ", ".join(matrices.types), *cells]


def predict(matrices: ModelWeights) -> LayerSeconds:
    meter = SpeedMeter(CPU, 1)
    try:
        speed = meter.others(1, {name: meter.product_seconds(name) for name in matrices.types})
    finally:
        meter.close()
    return layer_seconds(matrices, speed)


def steps_of(model: Path, weights: str, layer_count: int) -> LayerSeconds:
    """Measure what further layers add to a step of one layer, and what a head adds to the last layer."""
    candidate = Candidate("ggml", weights, "f16", "float32")

    def timer(start: int, end: int) -> SliceTimer:
        loaded = load_by(
            candidate, model, start, end, device="cpu", threads=1, context_length=CONTEXT_LENGTH, cache_dir=None
        )
        made = SliceTimer(loaded, device="cpu", reserve_tokens=2 * CONTEXT_TOKENS)
        made.step_seconds(ROW_COUNTS[1], CONTEXT_TOKENS, first_position=0)  # the rows that decode attends to
        return made

    start = (layer_count - 1 - FURTHER_LAYERS) // 2
    layers = [timer(start, start + 1), timer(start, start + 1 + FURTHER_LAYERS)]
    last = timer(layer_count - 1, layer_count)

    def per_layer(sessions: int, tokens: int, first_position: int) -> float:
        steps = [partial(each.step_seconds, sessions, tokens, first_position=first_position) for each in layers]
        return seconds_per_layer([least(step) for step in steps], FURTHER_LAYERS) / (sessions * tokens)

    head = partial(last.step_seconds, 1, 1, first_position=CONTEXT_TOKENS)
    return LayerSeconds(
        decode_layer_seconds=per_layer(1, 1, CONTEXT_TOKENS),
        prefill_layer_seconds_per_token=per_layer(1, ROW_COUNTS[2], 0),
        head_decode_seconds=least(partial(head, sampled=True)) - least(head),
        batched_layer_seconds=per_layer(ROW_COUNTS[1], 1, CONTEXT_TOKENS),
        batched_head_seconds=0.0,
    )


def least(step: Callable[[], float]) -> float:
    return min(step() for _ in range(ROUNDS))
