"""Progress of slow work: bars on a terminal, plain lines elsewhere, JSON lines to a parent process."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from abc import ABC, abstractmethod
from typing import IO, Literal

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

LINE_INTERVAL_SECONDS = 5.0  # between two lines of progress without a terminal: two in 10 seconds
REDRAW_INTERVAL_SECONDS = 0.1  # between two drawings of the bars


class Progress(ABC):
    """Rows of progress by key, and log lines that stay."""

    @abstractmethod
    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        """Show what `key` is doing; `fraction` is from 0 to 1, None if unknown."""

    @abstractmethod
    def finish(self, key: str) -> None:
        """Remove a row."""

    @abstractmethod
    def log(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:  # noqa: B027  # most leave nothing to undo
        """Remove all rows and leave the terminal as it was."""


class StartEvent(Struct, frozen=True, omit_defaults=True):
    """One call of Progress for another process, or how its start ended: `started` or `failed` is the last event."""

    type: Literal["show", "finish", "log", "started", "failed"]
    key: str = ""
    text: str = ""
    fraction: float | None = None
    cure: str = ""


class TerminalProgress(Progress):
    """Bars, drawn on each change. It runs no thread, so that processes can be started meanwhile."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            # on a narrow terminal the text is cut first: the bar says more than the end of a sentence
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

    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        self._bars.start()  # does nothing if it is shown already
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

    def finish(self, key: str) -> None:
        if key in self._rows:
            self._bars.remove_task(self._rows.pop(key))
            self._bars.refresh()  # a line that is printed later would draw the row again

    def log(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def close(self) -> None:
        for key in list(self._rows):
            self.finish(key)
        self._bars.stop()


class LineProgress(Progress):
    """Plain lines for a log or a pipe: all rows in one line when they changed, at most every LINE_INTERVAL_SECONDS."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._rows: dict[str, str] = {}
        self._printed = ""
        self._printed_seconds = float("-inf")

    def show(self, key: str, text: str, fraction: float | None = None) -> None:
        self._rows[key] = text if fraction is None else f"{text} ({fraction:.0%})"
        line = "; ".join(self._rows.values())
        now = time.monotonic()
        if line != self._printed and now - self._printed_seconds >= LINE_INTERVAL_SECONDS:
            self._printed, self._printed_seconds = line, now
            self.log(line)

    def finish(self, key: str) -> None:
        self._rows.pop(key, None)

    def log(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class PipeProgress(Progress):
    """JSON lines for the process that shows them; log lines go to standard output after that one has gone."""

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
        self._send(StartEvent("show", key, text, fraction))

    def finish(self, key: str) -> None:
        self._send(StartEvent("finish", key))

    def log(self, text: str) -> None:
        if self._descriptor is None:
            print(text, flush=True)
        else:
            self._send(StartEvent("log", text=text))

    def end(self, event: StartEvent) -> None:
        """Send the last event and close the pipe."""
        self._send(event)
        self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def open_progress(stream: IO[str] | None = None) -> Progress:
    """Return bars if `stream` (standard output by default) is a terminal, else lines."""
    stream = stream or sys.stdout
    console = Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return TerminalProgress(console)
    return LineProgress(stream)
