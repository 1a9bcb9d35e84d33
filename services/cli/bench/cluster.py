"""The cluster's side of `noodle bench`: prompts of one length, and the times of all tokens."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import uuid
from collections.abc import Sequence

from noodle.errors import GenerationFailed, NoodleError, RequestTimedOut
from services.cli.bench.report import RunTimes
from services.cli.client.http_client import error_in, post_for_events, post_json
from services.cli.client.target import Target
from services.cli.local.processes import Signals
from services.cli.verify.prompts import PROMPTS

TEXT_CHARACTERS = 160  # of each text that prompts are made from: short enough for any context
TEXT_TOKENS = 512  # tokens of text before the prompts repeat it
STRIDE = 37  # tokens between the starts of two prompts
RUN_SECONDS = 3600.0  # one run; a silent stream ends much earlier
LOOK_SECONDS = 0.2  # from Ctrl-C until it is noticed while streams run

Prompt = tuple[int, ...]


def text_token_ids(target: Target) -> Prompt:
    """Return token ids of ordinary text from the cluster's tokenizer. Raises NoodleError if it does not answer."""
    token_ids: list[int] = []
    for text in PROMPTS:
        body = {"inputs": text[:TEXT_CHARACTERS], "parameters": {"max_new_tokens": 1, "details": True}}
        answer = post_json(f"{target.url}/generate", body, target.credential)
        try:
            token_ids += [int(token) for token in answer["details"]["prompt_token_ids"]]
        except (KeyError, TypeError, ValueError) as error:
            raise GenerationFailed(
                f"{target.url}/generate answered without the prompt's token ids.",
                cure="Use the same version of noodle for the coordinator and this command.",
            ) from error
        if len(token_ids) >= TEXT_TOKENS:
            break
    return tuple(token_ids)


def prompts_of(text_ids: Prompt, prompt_tokens: int, streams: int, run: int) -> tuple[Prompt, ...]:
    """Return a prompt for each stream, all of one length: the same for the same run, others for another run."""
    prompts = []
    for stream in range(streams):
        begin = (run * streams + stream) * STRIDE
        prompts.append(tuple(text_ids[(begin + index) % len(text_ids)] for index in range(prompt_tokens)))
    return tuple(prompts)


def run_streams(target: Target, prompts: Sequence[Prompt], new_tokens: int, signals: Signals) -> RunTimes:
    """Generate from all prompts concurrently, greedily, past any end of text; raises the first error or Interrupted."""
    done: queue.SimpleQueue[tuple[int, tuple[float, ...] | NoodleError]] = queue.SimpleQueue()
    go = threading.Event()
    start_seconds = 0.0  # set when the threads may go

    def stream(index: int) -> None:
        go.wait()
        try:
            done.put((index, _arrivals(target, prompts[index], new_tokens, start_seconds)))
        except NoodleError as error:
            done.put((index, error))

    for index in range(len(prompts)):
        threading.Thread(target=stream, args=(index,), daemon=True).start()
    start_seconds = time.perf_counter()
    go.set()
    arrivals: dict[int, tuple[float, ...]] = {}
    while len(arrivals) < len(prompts):
        signals.raise_if_stopped()
        if time.perf_counter() - start_seconds > RUN_SECONDS:
            raise RequestTimedOut(f"{len(prompts)} streams took more than {RUN_SECONDS:.0f} seconds.")
        with contextlib.suppress(queue.Empty):
            index, result = done.get(timeout=LOOK_SECONDS)
            if isinstance(result, NoodleError):
                raise result
            arrivals[index] = result
    return RunTimes(len(prompts[0]), tuple(arrivals[index] for index in range(len(prompts))))


def _arrivals(target: Target, prompt: Prompt, new_tokens: int, start_seconds: float) -> tuple[float, ...]:
    """Return the seconds from the start to each token of one stream; raises GenerationFailed if tokens are missing."""
    # a salt of its own, so that nothing is reused that was computed for an equal prompt
    parameters = {"max_new_tokens": new_tokens, "ignore_eos": True, "cache_salt": uuid.uuid4().hex}
    body = {"inputs": prompt, "parameters": parameters}
    with contextlib.closing(post_for_events(f"{target.url}/generate_stream", body, target.credential)) as stream:
        events = [(time.perf_counter() - start_seconds, data) for data in stream]
    for _, data in events:
        if (error := error_in(json.loads(data))) is not None:
            raise error
    if len(events) != new_tokens:
        raise GenerationFailed(
            f"A stream returned {len(events)} tokens instead of {new_tokens}.", cure="See `noodle status` and the logs."
        )
    return tuple(seconds for seconds, _ in events)
