"""What a person sees while something takes longer than a second: bars on a terminal, plain lines elsewhere.

Knows how to show, not what is being waited for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import IO, Protocol

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

LINE_INTERVAL_SECONDS = 1.0  # without a terminal: at most one line of progress in this time
REDRAW_INTERVAL_SECONDS = 0.1


class Progress(Protocol):
    """Rows of progress by key, and lines that stay."""

    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        """Say what `key` does now; `fraction` from 0 to 1, None when nobody knows."""

    def finish(self, key: str, text: str) -> None:
        """The row is done: it stays as it is said here, or goes when `text` is empty."""

    def say(self, text: str) -> None:
        """A line of its own, which stays."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


class Shown(Struct, frozen=True, tag="show"):
    """A row that moved."""

    key: str
    text: str
    fraction: float | None = None


class Finished(Struct, frozen=True, tag="finish"):
    """A row that is done."""

    key: str
    text: str


class Said(Struct, frozen=True, tag="say"):
    """A line that stays."""

    text: str


class Started(Struct, frozen=True, tag="started"):
    """Everything is ready; nothing follows."""


class NotStarted(Struct, frozen=True, tag="failed"):
    """The start has failed; nothing follows."""

    message: str
    cure: str = ""


StartEvent = Shown | Finished | Said | Started | NotStarted


class TerminalProgress:
    """Bars, drawn again when told something new; without a thread, so that processes can be started beside it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            # the text gives way first: on a narrow terminal the bar says more than the end of a sentence
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._rows: dict[str, TaskID] = {}
        self._drawn_seconds = 0.0
        self._is_open = False

    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        """See Progress."""
        if not self._is_open:
            self._bars.start()
            self._is_open = True
        if key not in self._rows:
            self._rows[key] = self._bars.add_task(escape(text), total=None)
        self._bars.update(
            self._rows[key],
            description=escape(text),
            total=None if fraction is None else 1.0,
            completed=0.0 if fraction is None else fraction,
        )
        now = time.monotonic()
        if now - self._drawn_seconds >= REDRAW_INTERVAL_SECONDS:
            self._drawn_seconds = now
            self._bars.refresh()

    def finish(self, key: str, text: str) -> None:
        """See Progress."""
        if key in self._rows:
            self._bars.remove_task(self._rows.pop(key))
        if text:
            self.say(text)

    def say(self, text: str) -> None:
        """See Progress."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """See Progress."""
        if self._is_open:
            self._is_open = False
            for key in list(self._rows):
                self._bars.remove_task(self._rows.pop(key))
            self._bars.stop()


class LineProgress:
    """Plain lines for a log or a pipe: what all rows do, when it changed, at most once a second."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._rows: dict[str, str] = {}
        self._printed = ""
        self._printed_seconds = float("-inf")

    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        """See Progress."""
        self._rows[key] = text if fraction is None else f"{text} {fraction:.0%}"
        line = "; ".join(self._rows.values())
        now = time.monotonic()
        if line != self._printed and now - self._printed_seconds >= LINE_INTERVAL_SECONDS:
            self._printed, self._printed_seconds = line, now
            self.say(line)

    def finish(self, key: str, text: str) -> None:
        """See Progress."""
        self._rows.pop(key, None)
        if text:
            self.say(text)

    def say(self, text: str) -> None:
        """See Progress."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """See Progress."""


class PipeProgress:
    """Hands everything on as JSON lines, for the process that shows it; goes silent when that one has gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def _send(self, event: StartEvent) -> None:
        if self._descriptor is None:
            return
        try:
            os.write(self._descriptor, msgspec.json.encode(event) + b"\n")
        except BrokenPipeError:
            self.close()

    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        """See Progress."""
        self._send(Shown(key, text, fraction))

    def finish(self, key: str, text: str) -> None:
        """See Progress."""
        self._send(Finished(key, text))

    def say(self, text: str) -> None:
        """See Progress; without a reader it becomes a line of the log."""
        if self._descriptor is None:
            print(text, flush=True)
        else:
            self._send(Said(text))

    def end(self, event: Started | NotStarted) -> None:
        """The last word to the reader."""
        self._send(event)
        self.close()

    def close(self) -> None:
        """See Progress."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def open_progress(stream: IO[str] | None = None) -> Progress:
    """Bars when `stream` (standard output unless given) is a terminal, lines when it is not."""
    stream = stream or sys.stdout
    console = Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return TerminalProgress(console)
    return LineProgress(stream)
