"""`noodle up --detach`: a `noodle up` in the background, watched through a pipe until it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import IO

import msgspec

from noodle.errors import NoodleError, StartError
from services.cli.client.progress import PipeProgress, Progress, StartEvent
from services.cli.local.processes import Signals, python_module

REPORT_OPTION = "--report-to"  # of `noodle up`, for this file only: the descriptor of the pipe
SILENCE_SECONDS = 60.0  # between two looks at a pipe that sends nothing


def start_detached(arguments: Sequence[str], environment: Mapping[str, str], progress: Progress) -> int:
    """Start `noodle up` with these arguments in its own session; return 0 when it is ready.

    Raises StartError with its message if it fails. Ctrl-C before that stops it again.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as output, Signals() as signals:
        try:
            process = subprocess.Popen(
                [*python_module("services.cli", "up"), *arguments, REPORT_OPTION, str(writer)],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # until it opens its own log
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        last = _follow(output, process, signals, progress)
    if last is not None and last.type == "started":
        return 0
    process.wait()
    if last is not None:
        raise StartError(last.text, cure=last.cure)
    if signals.stop_requested:
        return 128 + signals.last_signal
    raise StartError(f"The background process ended with exit code {process.returncode} before it was ready.")


def _follow(
    output: IO[bytes], process: subprocess.Popen[bytes], signals: Signals, progress: Progress
) -> StartEvent | None:
    """Show its events until the last one; None if it ended without one."""
    for line in _lines_of(output, process, signals):
        event = msgspec.json.decode(line, type=StartEvent)
        if event.type == "show":
            progress.show(event.key, event.text, event.fraction)
        elif event.type == "finish":
            progress.finish(event.key)
        elif event.type == "log":
            progress.log(event.text)
        else:
            return event
    return None


def _lines_of(output: IO[bytes], process: subprocess.Popen[bytes], signals: Signals) -> Generator[bytes, None, None]:
    """Yield each whole line of a pipe until it is closed; stop the process once when a stop is requested."""
    rest = b""
    is_stopping = False
    while True:
        if signals.stop_requested and not is_stopping:
            is_stopping = True
            process.send_signal(signal.SIGTERM)
        if not signals.wait(SILENCE_SECONDS, [output]):
            continue
        part = os.read(output.fileno(), 65536)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


def report_to(descriptor: int, work: Callable[[PipeProgress, Callable[[], None]], int]) -> int:
    """In the background process: run `work(progress, on_ready)` and report to the watcher how the start went."""
    os.set_inheritable(descriptor, False)  # the services must not keep it open
    progress = PipeProgress(descriptor)
    try:
        return work(progress, lambda: progress.end(StartEvent("started")))
    except NoodleError as error:
        progress.end(StartEvent("failed", text=error.message, cure=error.cure))
        raise
    except Exception as error:
        text = f"`noodle up` failed unexpectedly: {type(error).__name__}: {error}"
        progress.end(StartEvent("failed", text=text))
        raise
