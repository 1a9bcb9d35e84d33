"""`noodle verify`: greedy answers of the cluster, held against the unsplit model in the cluster's own number format.

Asks over HTTP, compares in a process of its own (services/stage/tools/reference.py), and judges by verify_bounds.py.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noodle.config.settings import CommandConfig
from noodle.errors import GenerationFailed, NoodleError, NotReady, StartError
from services.cli.client.health import ask_health
from services.cli.client.http_client import post_json
from services.cli.client.progress import Progress, open_progress
from services.cli.client.target import Target
from services.cli.local.cluster import python_module
from services.cli.local.preparation import StoreError, find_model
from services.cli.local.processes import Interrupted, Signals, end_group, lines_of, start_child
from services.cli.verify.bounds import PromptResult, Verdict, format_of, judge, loosest, reference_dtype
from services.cli.verify.prompts import PROMPTS

REQUESTS_AT_A_TIME = 4  # also tries batches of sessions of different lengths
BROKEN_EXIT_CODE = 1


@dataclass(frozen=True)
class Answer:
    """What the cluster made of one prompt."""

    prompt: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class ReferenceLine(Struct, frozen=True):
    """One line of the reference process: exactly one of the three is there."""

    compared: int | None = None
    results: tuple[PromptResult, ...] | None = None
    error: StoreError | None = None


def verify(
    target: Target,
    config: CommandConfig,
    environment: Mapping[str, str],
    prompt_count: int | None,
    new_tokens: int,
    *,
    as_json: bool,
) -> int:
    """Print the table; 0 when the bound of the cluster's format holds, 1 when it is broken."""
    health = ask_health(target.url, target.token or target.credential)
    if health.status != "ready":
        raise NotReady(f"The cluster at {target.url} is not ready: {health.text()}", cure="See `noodle status`.")
    dtype = loosest([format_of(stage) for stage in health.answer.get("stages", []) if stage.get("layers")])
    prompts = PROMPTS[:prompt_count]
    progress = open_progress(sys.stderr)
    try:
        answers = ask_all(target, prompts, new_tokens, progress)
        with Signals() as signals:
            folder = find_model(target, config, environment, signals, progress).folder
            context_length = int(health.answer.get("context_length") or 0)
            results = compare(folder, reference_dtype(dtype), context_length, answers, environment, signals, progress)
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        progress.close()
    _refuse_other_tokenization(answers, results)
    verdict = judge(dtype, results)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode({"verdict": verdict, "prompts": results})).decode())
    else:
        _print(verdict, prompts, results)
    return BROKEN_EXIT_CODE if verdict.broken else 0


def ask_all(target: Target, prompts: Sequence[str], new_tokens: int, progress: Progress) -> list[Answer]:
    """The cluster's greedy answers, in the order of the prompts; raises the first error."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Answer | NoodleError]] = queue.SimpleQueue()
    for index in range(len(prompts)):
        waiting.put(index)

    def work() -> None:
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, ask(target, prompts[index], new_tokens)))
            except NoodleError as error:
                done.put((index, error))
                return

    for _ in range(min(REQUESTS_AT_A_TIME, len(prompts))):
        threading.Thread(target=work, daemon=True).start()  # Ctrl-C does not wait for the answers
    answers: dict[int, Answer] = {}
    while len(answers) < len(prompts):
        progress.show("ask", f"cluster: {len(answers)} of {len(prompts)} prompts", len(answers) / len(prompts))
        index, answer = done.get()
        if isinstance(answer, NoodleError):
            raise answer
        answers[index] = answer
    progress.finish("ask", "")
    return [answers[index] for index in range(len(prompts))]


def ask(target: Target, prompt: str, new_tokens: int) -> Answer:
    """One greedy answer with its log-probabilities; raises NoodleError."""
    parameters = {"max_new_tokens": new_tokens, "details": True, "ignore_eos": True}
    answer = post_json(f"{target.url}/generate", {"inputs": prompt, "parameters": parameters}, target.credential)
    try:
        details = answer["details"]
        tokens: list[dict[str, Any]] = details["tokens"]
        return Answer(
            prompt,
            int(details["prompt_tokens"]),
            tuple(int(token["id"]) for token in tokens),
            tuple(float(token["logprob"]) for token in tokens),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GenerationFailed(
            f"{target.url}/generate answered without token ids and log-probabilities ({error!r}).",
            cure="Is the coordinator of the same version as this command?",
        ) from error


def compare(
    folder: Path,
    dtype: str,
    context_length: int,
    answers: Sequence[Answer],
    environment: Mapping[str, str],
    signals: Signals,
    progress: Progress,
) -> tuple[PromptResult, ...]:
    """Run the unsplit model over the answers in a process of its own; raises NoodleError or Interrupted."""
    question = {
        "folder": str(folder),
        "dtype": dtype,
        "context_length": context_length,
        "prompts": [{"text": each.prompt, "token_ids": each.token_ids, "logprobs": each.logprobs} for each in answers],
    }
    process = start_child(
        python_module("services.stage.tools.reference"),
        environment,
        subprocess.PIPE,
        standard_input=subprocess.PIPE,
        errors=None,
    )
    assert process.stdin is not None  # noqa: S101  # both were asked for above
    assert process.stdout is not None  # noqa: S101
    progress.show("compare", "unsplit model: loading")
    try:
        with process.stdin as standard_input:
            standard_input.write(msgspec.json.encode(question))
        return _follow(process.stdout, len(answers), signals, progress)
    finally:
        end_group(process, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        progress.finish("compare", "")


def _follow(output: IO[bytes], count: int, signals: Signals, progress: Progress) -> tuple[PromptResult, ...]:
    for line in lines_of(output, signals):
        said = msgspec.json.decode(line, type=ReferenceLine)
        if said.error is not None:
            raise StartError(said.error.message, cure=said.error.cure)
        if said.results is not None:
            return said.results
        if said.compared is not None:
            progress.show("compare", f"unsplit model: {said.compared} of {count} prompts", said.compared / count)
    raise GenerationFailed("The unsplit model's process ended without a result.", cure="Its last words stand above.")


def _refuse_other_tokenization(answers: Sequence[Answer], results: Sequence[PromptResult]) -> None:
    for answer, result in zip(answers, results, strict=True):
        if answer.prompt_tokens != result.prompt_tokens:
            raise GenerationFailed(
                f"The cluster made {answer.prompt_tokens} tokens of {answer.prompt[:40]!r}, "
                f"the unsplit model's tokenizer makes {result.prompt_tokens}.",
                cure="Does NOODLE_MODEL name the model that the cluster serves?",
            )


def _print(verdict: Verdict, prompts: Sequence[str], results: Sequence[PromptResult]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("prompt")
    for title in ("prompt tokens", "new tokens", "logprob error", "likeliest", "first difference", "logit gap there"):
        table.add_column(title, justify="right")
    for prompt, result in zip(prompts, results, strict=True):
        first = result.differences[0] if result.differences else None
        table.add_row(
            escape(repr(prompt[:32])),
            str(result.prompt_tokens),
            str(result.tokens),
            f"{result.largest_logprob_error:.1e}",
            f"{1 - len(result.differences) / result.tokens:.1%}",
            str(first.index) if first else "none",
            f"{first.logit_gap:.1e} (two best {first.two_best_gap:.1e})" if first else "",
        )
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160  # a pipe has no edge to break lines at
    console.print(table)
    print(
        f"{verdict.dtype}: {verdict.tokens} tokens, {verdict.top1_agreement:.2%} the unsplit model's likeliest, "
        f"largest log-probability error {verdict.largest_logprob_error:.1e}"
    )
    for reason in verdict.broken:
        print(f"broken: {reason}.")
    if not verdict.broken:
        print("The split changes nothing beyond rounding.")
