"""`noodle up --detach`: a `noodle up` in the background, watched until it is ready; knows the pipe between the two."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import msgspec

from noodle.errors import NoodleError, StartError
from services.cli.client.progress import Finished, NotStarted, PipeProgress, Progress, Said, Shown, Started, StartEvent
from services.cli.local.cluster import python_module
from services.cli.local.processes import Signals, lines_of

REPORT_OPTION = "--report-to"  # of `noodle up`, for this file only: the number of the pipe's descriptor


def start_detached(arguments: Sequence[str], environment: Mapping[str, str], progress: Progress) -> int:
    """Start `noodle up` with these arguments in a session of its own; exit code 0 when it is ready.

    Raises StartError in its words when it is not. Ctrl-C before that stops it again.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as output, Signals() as signals:
        try:
            process = subprocess.Popen(
                [*python_module("services.cli", "up"), *arguments, REPORT_OPTION, str(writer)],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # until it has a log of its own
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        last = _follow(output, process, signals, progress)
    if isinstance(last, Started):
        return 0
    process.wait()
    if isinstance(last, NotStarted):
        raise StartError(last.message, cure=last.cure)
    if signals.stop_requested:
        return 128 + signals.last_signal
    raise StartError(f"The background process ended with exit code {process.returncode} before it was ready.")


def _follow(
    output: IO[bytes], process: subprocess.Popen[bytes], signals: Signals, progress: Progress
) -> Started | NotStarted | None:
    """Show what it reports until its last word, or None when it ended without one."""
    for line in lines_of(output, signals, lambda: process.send_signal(signal.SIGTERM)):
        event: StartEvent = msgspec.json.decode(line, type=StartEvent)
        if isinstance(event, Started | NotStarted):
            return event
        _show(event, progress)
    return None


def _show(event: Shown | Finished | Said, progress: Progress) -> None:
    if isinstance(event, Shown):
        progress.show(event.key, event.text, event.fraction)
    elif isinstance(event, Finished):
        progress.finish(event.key, event.text)
    else:
        progress.say(event.text)


def report_to(descriptor: int, work: Callable[[PipeProgress, Callable[[], None]], int]) -> int:
    """In the background process: run `work(progress, on_ready)` and let the watching one know how it starts."""
    os.set_inheritable(descriptor, False)  # the services must not keep it open
    progress = PipeProgress(descriptor)
    try:
        return work(progress, lambda: progress.end(Started()))
    except NoodleError as error:
        progress.end(NotStarted(error.message, error.cure))
        raise
    except Exception as error:
        progress.end(NotStarted(f"A fault in `noodle up`: {type(error).__name__}: {error}"))
        raise
