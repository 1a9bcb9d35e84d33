"""`noodle plan`: which machine gets which layers and why, with memory and predicted speed; changes no plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from noodle.config.environment import command_config, process_environment
from noodle.errors import ConfigurationError, LinkLost, NoodleError
from services.cli.client.http_client import error_in, post_for_answer
from services.cli.client.reports import print_json, print_table
from services.cli.client.target import find_target

DOES_NOT_FIT_EXIT_CODE = 1
PLAN_SECONDS = 90.0  # the planner's answer
MAXIMUM_FILE_BYTES = 256 << 10  # size of a --nodes file
MARKS = {"measured": "m", "configured": "g", "assumed": "a", "computed": "c"}
LEGEND = "m measured, c computed from the model's files and the dtype, g given, a assumed"
TITLES = ("machine", "stage", "device", "computed by", "layers")
FIGURES = ("ms a layer", "weights", "KV rows", "free", "left", "ms a token")


def plan(options: argparse.Namespace) -> int:
    """Print the plan for the registered machines or those of a file; 0 if it fits, 1 if it does not."""
    target = find_target(command_config(process_environment()), options.url, options.key)
    body = {} if options.nodes is None else _nodes(options.nodes)
    status, answer = post_for_answer(f"{target.url}/plan/generate", body, target.credential, PLAN_SECONDS)
    if status != 200 and "short" not in answer:
        raise error_in(answer) or LinkLost(f"{target.url} answered {status}.", cure="See `noodle status`.")
    if options.json:
        print_json(answer)
    elif status == 200:
        _print_plan(answer["plan"])
    else:
        _print_shortage(error_in(answer), answer["short"])
    if not options.json and answer.get("not_used"):
        print(f"Not used: {', '.join(answer['not_used'])}.")
    return 0 if status == 200 else DOES_NOT_FIT_EXIT_CODE


def _nodes(file: str) -> object:
    """Return what the file holds; the planner checks its fields."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not text in UTF-8.") from error
    cure = 'Write [{"node_id": "a", "device_type": "cuda", "vram_gb": 4}, ...].'
    if len(text) > MAXIMUM_FILE_BYTES:
        raise ConfigurationError(f"{file} is longer than {MAXIMUM_FILE_BYTES} bytes.", cure=cure)
    try:
        nodes = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON: {error}.", cure=cure) from error
    except RecursionError as error:
        raise ConfigurationError(f"{file} is nested too deeply.", cure=cure) from error
    if not isinstance(nodes, list | dict):
        raise ConfigurationError(f"{file} holds neither a list nor an object.", cure=cure)
    return nodes


def _print_plan(seen: dict[str, Any]) -> None:
    active = f"the same as the active plan {seen['active_version']}" if seen["is_active"] else "not the active plan"
    print(
        f"{seen['model']}: {seen['layer_count']} layers, a context of {seen['context_length']} tokens, "
        f"planned with KV rows for {seen['kv_tokens']} tokens; {active}."
    )
    print(seen["reason"])
    print_table((*TITLES, *FIGURES), list(map(_cells, seen["stages"])), right=FIGURES)
    for line in dict.fromkeys(_choices(seen["stages"])):
        print(line)
    print(_prediction(seen["prediction"], seen["stages"]))
    if gain := seen.get("faster_format"):
        print(
            f"NOODLE_WEIGHTS={gain['weights']}: {gain['decode_ratio']:.1f} times as fast for new tokens, "
            f"{gain['prefill_ratio']:.1f} times for prompts m. It changes the model."
        )
    print(f"({LEGEND})")


def _cells(stage: dict[str, Any]) -> tuple[str, ...]:
    sources = stage["sources"]
    return (
        stage["node_id"],
        str(stage["stage_id"]),
        stage["device_type"],
        f"{stage['executor']} {stage['weights']} {MARKS[sources['dtype']]}",
        f"{stage['start_layer']} to {stage['end_layer'] - 1} ({stage['layer_count']})",
        _milliseconds(stage["layer_seconds"], sources["layer_seconds"]),
        _size(stage["weight_bytes"], sources["weight_bytes"]),
        _size(stage["kv_bytes"], sources["kv_bytes"]),
        _size(stage["free_bytes"], sources["free_bytes"]),
        _size(stage["memory_left_bytes"], sources["free_bytes"]),
        _milliseconds(stage["decode_seconds"], sources["decode_seconds"]),
    )


def _prediction(predicted: dict[str, Any], stages: list[dict[str, Any]]) -> str:
    computing_seconds = sum(stage["decode_seconds"] for stage in stages)
    return (
        f"Predicted: {predicted['tokens_per_second']:.1f} tokens/s {MARKS[predicted['source']]} for one request "
        f"({computing_seconds * 1000:.1f} ms {MARKS[_weakest(stages)]} for layers and head, {predicted['hops']} hops "
        f"of {predicted['hop_seconds'] * 1000:.1f} ms {MARKS[predicted['hop_source']]}), at most "
        f"{1 / predicted['steady_token_seconds']:.1f} for concurrent requests, "
        f"{predicted['prefill_tokens_per_second']:.0f} prompt tokens/s; "
        f"stage {predicted['slowest_stage_id']} is the bottleneck."
    )


def _choices(stages: list[dict[str, Any]]) -> list[str]:
    """Say why each stage computes as it does, and in which format its hidden states travel."""
    lines = [f"{stage['node_id']}: {stage['choice']}." for stage in stages if stage.get("choice")]
    for stage in stages:
        if stage.get("hop_dtype"):
            link = stage.get("link_bytes_per_second") or 0.0
            speed = f" over a link of {link / 1e6:.0f} MB/s m" if link else ""
            lines.append(f"Stage {stage['stage_id']} sends hidden states in {stage['hop_dtype']}{speed}.")
    return lines


def _weakest(stages: list[dict[str, Any]]) -> str:
    sources = {stage["sources"]["decode_seconds"] for stage in stages}
    return next((source for source in ("assumed", "configured") if source in sources), "measured")


def _print_shortage(error: NoodleError | None, short: dict[str, Any]) -> None:
    print(f"The model does not fit. {error}" if error else "The model does not fit.")
    for memory in short["memories"]:
        held = ", ".join(
            f"stage {stage_id} with layers {start} to {end - 1}"
            for stage_id, (start, end) in zip(memory["stage_ids"], memory["layers"], strict=True)
        )
        print(
            f"{memory['machine']} ({memory['device']}; {held}) needs {memory['needed_bytes']} bytes, "
            f"{memory['usable_bytes']} are usable: {memory['short_bytes']} bytes short."
        )
    print("Each of these alone would help:")
    for cure in short["cures"]:
        print(f"- {cure['text']}")


def _size(byte_count: int, source: str) -> str:
    shown = f"{byte_count / 1e6:.0f} MB" if byte_count >= 1_000_000 else f"{byte_count} B"
    return f"{shown} {MARKS[source]}"


def _milliseconds(seconds: float, source: str) -> str:
    return f"{seconds * 1000:.2f} {MARKS[source]}"
