from __future__ import annotations

import io
import os

import pytest

from services.cli.client import progress as progress_module
from services.cli.client.progress import LineProgress, PipeProgress, StartEvent, TerminalProgress, open_progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_seconds = 100.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now_seconds)


def test_without_a_terminal_progress_is_at_most_two_lines_in_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    lines = LineProgress(stream)
    for percent in range(100):
        lines.show("a", "loading", percent / 100)
        clock.now_seconds += 0.25
    assert stream.getvalue().splitlines()[:3] == ["loading (0%)", "loading (20%)", "loading (40%)"]
    assert len(stream.getvalue().splitlines()) == 5  # in 25 seconds


def test_all_rows_stand_in_one_line_and_one_that_is_done_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    lines = LineProgress(stream)
    lines.show("a", "a: loading", 0.5)
    clock.now_seconds += 6
    lines.show("b", "b: starting")
    lines.finish("a")
    clock.now_seconds += 6
    lines.show("b", "b: loading", 0.1)
    lines.finish("b")
    assert stream.getvalue().splitlines() == [
        "a: loading (50%)",
        "a: loading (50%); b: starting",
        "b: loading (10%)",
    ]


def test_what_did_not_change_is_not_printed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    lines = LineProgress(stream)
    for _ in range(5):
        lines.show("a", "waiting")
        clock.now_seconds += 6
    assert stream.getvalue() == "waiting\n"


def test_a_terminal_gets_bars_and_text_with_brackets_stays_whole() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    bars = open_progress(terminal)
    if not isinstance(bars, TerminalProgress):
        pytest.skip("TERM is dumb here")
    bars.show("a", "loading [bold]x[/bold]", 0.5)
    bars.log("[red]logged[/red]")
    bars.finish("a")
    bars.close()
    assert "[bold]x[/bold]" in terminal.getvalue()
    assert "[red]logged[/red]" in terminal.getvalue()


def test_a_background_process_goes_on_when_its_watcher_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    pipe = PipeProgress(writer)
    pipe.show("a", "loading", 0.5)
    assert os.read(reader, 1000) == b'{"type":"show","key":"a","text":"loading","fraction":0.5}\n'
    os.close(reader)
    pipe.show("a", "loading", 0.6)
    pipe.log("a line for the log")
    pipe.end(StartEvent("started"))
    assert capsys.readouterr().out == "a line for the log\n"
