"""`noodle generate`: one prompt, its text on the terminal as it comes; an OpenAI client like any other."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from noodle.errors import InvalidRequest, LinkLost
from services.cli.client.http_client import error_in, get_json, post_for_events
from services.cli.client.target import Target

STREAM_END = "[DONE]"


@dataclass
class Told:
    """What a stream has said so far."""

    completion_tokens: int = 0
    prompt_tokens: int = 0
    has_text: bool = False
    is_finished: bool = False


def generate(target: Target, prompt: str, parameters: Mapping[str, Any], *, raw: bool) -> int:
    """Stream the answer to standard output; what it took goes to standard error when that is a terminal."""
    if not prompt:
        raise InvalidRequest("The prompt is empty.", cure='Write it as: noodle generate "Why is the sky blue?"')
    path, body = _request(served_model(target), prompt, parameters, raw=raw)
    write = _writer(sys.stdout)
    began_seconds = time.monotonic()
    told = Told()
    try:
        with contextlib.closing(post_for_events(target.url + path, body, target.credential)) as events:
            for data in events:
                if data == STREAM_END:
                    told.is_finished = True
                    break
                text = _text_of(json.loads(data), told)
                told.has_text = told.has_text or bool(text)
                write(text)
    finally:
        if told.has_text:
            write("\n")  # what comes next begins on a line of its own, also after Ctrl-C
    if not told.is_finished:
        raise LinkLost("The answer broke off.", cure="See `noodle status` and the logs.")
    if sys.stderr.isatty():
        seconds = time.monotonic() - began_seconds
        print(f"[{told.prompt_tokens} prompt tokens, {told.completion_tokens} new in {seconds:.1f} s]", file=sys.stderr)
    return 0


def served_model(target: Target) -> str:
    """The name of the model that the coordinator serves; raises NoodleError when it does not say."""
    status, answer = get_json(f"{target.url}/v1/models", target.credential)
    if status >= 400:
        # asked as a POST would be, so that the words are the same: refused key, not ready
        raise error_in(answer) or LinkLost(f"{target.url} answered {status}.", cure="See `noodle status`.")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise LinkLost(
            f"{target.url} names no model.", cure="Is it a noodle coordinator? See `noodle status`."
        ) from error


def _request(model: str, prompt: str, parameters: Mapping[str, Any], *, raw: bool) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **parameters}
    if raw:
        return "/v1/completions", body | {"prompt": prompt}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}


def _text_of(event: dict[str, Any], told: Told) -> str:
    """The text that one chunk adds; raises NoodleError when it carries an error instead."""
    error = error_in(event)
    if error is not None:
        raise error
    usage = event.get("usage") or {}
    told.prompt_tokens = usage.get("prompt_tokens", told.prompt_tokens)
    told.completion_tokens = usage.get("completion_tokens", told.completion_tokens)
    choices = event.get("choices") or [{}]
    text = choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""
    return str(text)


def _writer(stream: IO[str]) -> Callable[[str], None]:
    """Writes at once; a terminal gets no control characters from a model, which could move or rename it."""
    is_terminal = stream.isatty()

    def write(text: str) -> None:
        if is_terminal:
            text = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
        stream.write(text)
        stream.flush()

    return write
