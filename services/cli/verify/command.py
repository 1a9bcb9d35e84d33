"""`noodle verify`: compares greedy answers of the cluster with the unsplit model in the cluster's own number format."""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from noodle.cluster.measuring import GreedyAnswer, PromptResult, ReferenceLine, ReferenceQuestion
from noodle.config.environment import command_config, process_environment
from noodle.errors import GenerationFailed, NoodleError
from services.cli.client.health import require_ready
from services.cli.client.http_client import post_json
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import print_json, print_table
from services.cli.client.target import Target, find_target
from services.cli.local.conversation import Conversation
from services.cli.local.preparation import find_model
from services.cli.local.processes import Signals, python_module
from services.cli.verify.bounds import Verdict, format_of, judge, loosest, reference_dtype
from services.cli.verify.prompts import PROMPTS

CONCURRENT_REQUESTS = 4  # so that batches of sessions of different lengths are verified too
BROKEN_EXIT_CODE = 1
FIGURES = ("prompt tokens", "new tokens", "logprob error", "most likely", "first difference", "logit gap there")


def verify(options: argparse.Namespace) -> int:
    """Print the comparison; 0 if the bound of the cluster's format holds, 1 if it is broken."""
    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    health = require_ready(target)
    dtype = loosest([format_of(stage) for stage in health.stages if stage.get("layers")])
    prompts = PROMPTS[: options.prompts]
    with contextlib.closing(open_progress(sys.stderr)) as progress:
        answers = ask_all(target, prompts, options.new_tokens, progress)
        with Signals() as signals:
            folder = find_model(target, config, environment, signals, progress).path
            question = ReferenceQuestion(
                str(folder), reference_dtype(dtype), health.context_length, answers=tuple(answers)
            )
            results = compare(question, environment, signals, progress)
    _refuse_other_tokenization(answers, results)
    verdict = judge(dtype, results)
    if options.json:
        print_json({"verdict": verdict, "prompts": results})
    else:
        _print(verdict, prompts, results)
    return BROKEN_EXIT_CODE if verdict.broken else 0


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
            int(details["prompt_tokens"]),
            tuple(int(token["id"]) for token in tokens),
            tuple(float(token["logprob"]) for token in tokens),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GenerationFailed(
            f"{target.url}/generate answered without token ids and log-probabilities ({error!r}).",
            cure="Use the same version of noodle for the coordinator and this command.",
        ) from error


def compare(
    question: ReferenceQuestion, environment: Mapping[str, str], signals: Signals, progress: Progress
) -> tuple[PromptResult, ...]:
    """Run the unsplit model over the answers in a process of its own; raises NoodleError or Interrupted."""
    count = len(question.answers)
    progress.show("compare", "unsplit model: loading")
    reference = python_module("services.stage.tools.reference")
    try:
        with Conversation(reference, "unsplit model", environment, signals) as process:
            process.send(question, is_last=True)
            while True:
                line = process.receive(ReferenceLine)
                if line.results is not None:
                    return line.results
                if line.compared is not None:
                    progress.show(
                        "compare", f"unsplit model: {line.compared} of {count} prompts", line.compared / count
                    )
    finally:
        progress.finish("compare")


def _refuse_other_tokenization(answers: Sequence[GreedyAnswer], results: Sequence[PromptResult]) -> None:
    for answer, result in zip(answers, results, strict=True):
        if answer.prompt_tokens != result.prompt_tokens:
            raise GenerationFailed(
                f"The cluster's tokenizer makes {answer.prompt_tokens} tokens of {answer.prompt[:40]!r}, "
                f"the unsplit model's makes {result.prompt_tokens}.",
                cure="Check that NOODLE_MODEL names the model that the cluster serves.",
            )


def _print(verdict: Verdict, prompts: Sequence[str], results: Sequence[PromptResult]) -> None:
    rows = []
    for prompt, result in zip(prompts, results, strict=True):
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
    print_table(("prompt", *FIGURES), rows, right=FIGURES)
    print(
        f"{verdict.dtype}: {verdict.tokens} tokens, {verdict.top1_agreement:.2%} are the unsplit model's most likely, "
        f"largest log-probability error {verdict.largest_logprob_error:.1e}"
    )
    for reason in verdict.broken:
        print(f"broken: {reason}.")
    if not verdict.broken:
        print("The split changes nothing beyond rounding.")
