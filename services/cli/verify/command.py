"""`noodle verify`: compares greedy answers of the cluster with the unsplit model.

The first reference is the cluster's own executor in one process; the second one is transformers, where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec.structs import replace

from noodle.cluster.measuring import GreedyAnswer, PromptResult, ReferenceLine, ReferencePart, ReferenceQuestion
from noodle.config.environment import command_config, process_environment
from noodle.errors import GenerationFailed, NoodleError
from noodle.installation import has_transformers, require_transformers
from services.cli.client.health import require_ready
from services.cli.client.http_client import post_json
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import print_json, print_table
from services.cli.client.target import Target, find_target
from services.cli.local.conversation import Conversation
from services.cli.local.preparation import find_model
from services.cli.local.processes import Signals, python_module
from services.cli.verify.bounds import (
    BOUNDS,
    SAME_BOUNDS,
    Bound,
    Verdict,
    advice,
    format_of,
    judge,
    loosest,
    reference_dtype,
)
from services.cli.verify.prompts import PROMPTS

CONCURRENT_REQUESTS = 4  # so that batches of sessions of different lengths are verified too
BROKEN_EXIT_CODE = 1
NO_BARS = {"TQDM_DISABLE": "1"}  # transformers shows one for a GGUF file whatever it is told
FIGURES = ("prompt tokens", "new tokens", "logprob error", "most likely", "first difference", "logit gap there")


@dataclass(frozen=True)
class Reference:
    """What the cluster is compared with, and the bounds of that by format."""

    name: str
    module: str
    bounds: Mapping[str, Bound]


REFERENCES = (
    Reference("the same executor", "services.stage.tools.reference", SAME_BOUNDS),
    Reference("transformers", "services.stage.tools.transformers_reference", BOUNDS),
)


@dataclass(frozen=True)
class Comparison:
    """A reference's results, or why it is unable to compute this model."""

    reference: Reference
    results: tuple[PromptResult, ...]
    unable: str = ""


def verify(options: argparse.Namespace) -> int:
    """Print the comparisons; 0 if the bounds of the cluster's format hold, 1 if one is broken."""
    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    health = require_ready(target)
    stages = [stage for stage in health.stages if stage.get("layers")]
    name = loosest([format_of(stage) for stage in stages])
    parts = parts_of(stages)
    if any(part.executor == "transformers" for part in parts):
        require_transformers("Comparing with a stage that computes by transformers")
    prompts = PROMPTS[: options.prompts]
    with contextlib.closing(open_progress(sys.stderr)) as progress:
        answers = ask_all(target, prompts, options.new_tokens, progress)
        with Signals() as signals:
            question = ReferenceQuestion(
                str(find_model(target, config, environment, signals, progress).path),
                health.context_length,
                answers=tuple(answers),
                parts=parts,
                dtype=reference_dtype(name),
                threads=config.threads,
                cache_dir=str(config.cache_dir),
            )
            run = partial(compare, question, environment=environment, signals=signals, progress=progress)
            comparisons = [run(reference) for reference in REFERENCES[: 2 if has_transformers() else 1]]
    compared = [each for each in comparisons if not each.unable]
    judged = [(each, judge(name, each.reference.bounds[name], each.results)) for each in compared]
    if options.json:
        print_json(_as_json(comparisons, judged))
    else:
        for each, verdict in judged:
            _print(each, verdict, prompts)
        for each in comparisons:
            if each.unable:
                print(f"Not compared with {each.reference.name}: {each.unable}")
    return BROKEN_EXIT_CODE if any(verdict.broken for _, verdict in judged) else 0


def parts_of(stages: Sequence[Mapping[str, Any]]) -> tuple[ReferencePart, ...]:
    """The model's layers in order; neighbouring stages that compute in the same way are one part."""
    parts: list[ReferencePart] = []
    for stage in sorted(stages, key=lambda stage: list(stage["layers"])):
        begin, end = stage["layers"]
        part = ReferencePart(
            begin, end, stage["executor"], weights=stage["weights"], kv_dtype=stage["kv_dtype"], dtype=stage["dtype"]
        )
        if parts and replace(parts[-1], end_layer=end) == replace(part, start_layer=parts[-1].start_layer):
            parts[-1] = replace(parts[-1], end_layer=end)
        else:
            parts.append(part)
    return tuple(parts)


def ask_all(target: Target, prompts: Sequence[str], new_tokens: int, progress: Progress) -> list[GreedyAnswer]:
    """Return the cluster's greedy answers, in the order of the prompts; raises the first error."""
    waiting = iter(range(len(prompts)))  # shared by the threads: its next() is atomic
    done: queue.SimpleQueue[tuple[int, GreedyAnswer | NoodleError]] = queue.SimpleQueue()

    def work() -> None:
        for index in waiting:
            try:
                done.put((index, ask(target, prompts[index], new_tokens)))
            except NoodleError as error:
                done.put((index, error))
                return

    for _ in range(min(CONCURRENT_REQUESTS, len(prompts))):
        threading.Thread(target=work, daemon=True).start()  # daemons, so that Ctrl-C does not wait for them
    answers: dict[int, GreedyAnswer] = {}
    while len(answers) < len(prompts):
        progress.show("ask", f"cluster: {len(answers)} of {len(prompts)} prompts", len(answers) / len(prompts))
        index, answer = done.get()
        if isinstance(answer, NoodleError):
            raise answer
        answers[index] = answer
    progress.finish("ask")
    return [answers[index] for index in range(len(prompts))]


def ask(target: Target, prompt: str, new_tokens: int) -> GreedyAnswer:
    """Return one greedy answer with its log-probabilities; raises NoodleError."""
    parameters = {"max_new_tokens": new_tokens, "details": True, "ignore_eos": True}
    answer = post_json(f"{target.url}/generate", {"inputs": prompt, "parameters": parameters}, target.credential)
    try:
        details = answer["details"]
        tokens: list[dict[str, Any]] = details["tokens"]
        return GreedyAnswer(
            prompt,
            tuple(int(token) for token in details["prompt_token_ids"]),
            tuple(int(token["id"]) for token in tokens),
            tuple(float(token["logprob"]) for token in tokens),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GenerationFailed(
            f"{target.url}/generate answered without token ids and log-probabilities ({error!r}).",
            cure="Use the same version of noodle for the coordinator and this command.",
        ) from error


def compare(
    question: ReferenceQuestion,
    reference: Reference,
    *,
    environment: Mapping[str, str],
    signals: Signals,
    progress: Progress,
) -> Comparison:
    """Run a reference over the answers in a process of its own; raises NoodleError or Interrupted."""
    count, name = len(question.answers), f"unsplit model by {reference.name}"
    progress.show("compare", f"{name}: loading")
    try:
        with Conversation(python_module(reference.module), name, {**environment, **NO_BARS}, signals) as process:
            process.send(question, is_last=True)
            while True:
                line = process.receive(ReferenceLine)
                if line.results is not None or line.unable:
                    return Comparison(reference, line.results or (), line.unable)
                if line.compared is not None:
                    progress.show("compare", f"{name}: {line.compared} of {count} prompts", line.compared / count)
    finally:
        progress.finish("compare")


def _as_json(comparisons: Sequence[Comparison], judged: Sequence[tuple[Comparison, Verdict]]) -> dict[str, Any]:
    """The first reference's verdict and prompts, and the others' by name."""
    found = {each.reference.name: {"verdict": verdict, "prompts": each.results} for each, verdict in judged}
    unable = {each.reference.name: {"unable": each.unable} for each in comparisons if each.unable}
    return {**found.pop(REFERENCES[0].name), **found, **unable}


def _print(comparison: Comparison, verdict: Verdict, prompts: Sequence[str]) -> None:
    rows = []
    for prompt, result in zip(prompts, comparison.results, strict=True):
        first = result.differences[0] if result.differences else None
        cells = (
            repr(prompt[:32]),
            str(result.prompt_tokens),
            str(result.tokens),
            f"{result.largest_logprob_error:.1e}",
            f"{1 - len(result.differences) / result.tokens:.1%}",
            str(first.index) if first else "none",
            f"{first.logit_gap:.1e} (two best {first.two_best_gap:.1e})" if first else "",
        )
        rows.append(cells)
    print(f"The unsplit model by {comparison.reference.name}:")
    print_table(("prompt", *FIGURES), rows, right=FIGURES)
    print(
        f"{verdict.dtype}: {verdict.tokens} tokens, {verdict.top1_agreement:.2%} are the unsplit model's most likely, "
        f"largest log-probability error {verdict.largest_logprob_error:.1e}"
    )
    for reason in verdict.broken:
        print(f"broken: {reason}.")
    if verdict.broken:
        print(advice(verdict))
    else:
        print("The split changes nothing beyond rounding.")
