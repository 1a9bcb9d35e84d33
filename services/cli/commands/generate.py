"""`noodle generate`: sends one prompt as an OpenAI client would, and streams the answer to the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from noodle.config.environment import command_config, process_environment
from noodle.errors import InvalidRequest, LinkLost
from services.cli.client.http_client import error_in, get_json, post_for_events
from services.cli.client.target import Target, find_target

STREAM_END = "[DONE]"


def generate(options: argparse.Namespace) -> int:
    target = find_target(command_config(process_environment()), options.url, options.key)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    parameters = {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return stream_answer(target, prompt, given, raw=options.raw)


def stream_answer(target: Target, prompt: str, parameters: Mapping[str, Any], *, raw: bool) -> int:
    """Stream the answer to standard output; token counts and time go to standard error if that is a terminal."""
    if not prompt:
        raise InvalidRequest("The prompt is empty.", cure='Write it as: noodle generate "Why is the sky blue?"')
    path, body = _request(served_model(target), prompt, parameters, raw=raw)
    write = _writer(sys.stdout)
    began_seconds = time.monotonic()
    usage: dict[str, int] = {}
    has_text = is_finished = False
    try:
        with contextlib.closing(post_for_events(target.url + path, body, target.credential)) as events:
            for data in events:
                if data == STREAM_END:
                    is_finished = True
                    break
                event = json.loads(data)
                text = _text_of(event)
                usage = event.get("usage") or usage
                has_text = has_text or bool(text)
                write(text)
    finally:
        if has_text:
            write("\n")  # what follows begins on its own line, also after Ctrl-C
    if not is_finished:
        raise LinkLost("The answer was cut off.", cure="See `noodle status` and the logs.")
    if sys.stderr.isatty():
        seconds = time.monotonic() - began_seconds
        counts = f"{usage.get('prompt_tokens', 0)} prompt tokens, {usage.get('completion_tokens', 0)} new tokens"
        print(f"[{counts} in {seconds:.1f} s]", file=sys.stderr)
    return 0


def served_model(target: Target) -> str:
    """Return the name of the model that the coordinator serves; raises NoodleError if it names none."""
    status, answer = get_json(f"{target.url}/v1/models", target.credential)
    if status >= 400:
        raise error_in(answer) or LinkLost(f"{target.url} answered {status}.", cure="See `noodle status`.")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise LinkLost(
            f"{target.url} names no model.", cure="Check with `noodle status` that it is a noodle coordinator."
        ) from error


def _request(model: str, prompt: str, parameters: Mapping[str, Any], *, raw: bool) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **parameters}
    if raw:
        return "/v1/completions", body | {"prompt": prompt}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}


def _text_of(event: dict[str, Any]) -> str:
    """Return the text of one chunk; raises NoodleError if it carries an error instead."""
    error = error_in(event)
    if error is not None:
        raise error
    choice = (event.get("choices") or [{}])[0]
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def _writer(stream: IO[str]) -> Callable[[str], None]:
    """Return a function that writes at once. A terminal gets no control characters, which could rename or move it."""
    is_terminal = stream.isatty()

    def write(text: str) -> None:
        if is_terminal:
            text = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
        stream.write(text)
        stream.flush()

    return write
