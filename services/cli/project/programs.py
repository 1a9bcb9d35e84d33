"""Runs other programs, as docker, ssh and nvidia-smi, for their output, each with a time limit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Run = Callable[[Sequence[str], float], "Ran"]
System = Literal["linux", "windows", "other"]
KEPT_LINES = 40  # last lines of a program that is followed


@dataclass(frozen=True)
class Ran:
    """What a program printed before it ended, or why it printed nothing."""

    code: int = 0
    output: str = ""
    errors: str = ""
    is_missing: bool = False  # the program is not installed
    is_late: bool = False  # it was killed at its time limit

    @property
    def is_good(self) -> bool:
        return self.code == 0 and not self.is_missing and not self.is_late

    @property
    def last_line(self) -> str:
        """Its last line, for a message."""
        lines = [line.strip() for line in (self.errors or self.output).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def run_program(arguments: Sequence[str], seconds: float, folder: Path | None = None) -> Ran:
    """Run a program to its end or for `seconds`, without standard input."""
    try:
        done = subprocess.run(
            list(arguments), capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds, check=False, cwd=folder
        )
    except FileNotFoundError:
        return Ran(code=127, is_missing=True)
    except PermissionError as error:
        return Ran(code=126, errors=f"{error.strerror}")
    except subprocess.TimeoutExpired:
        return Ran(code=124, is_late=True)
    return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def this_system() -> System:
    """Return the system whose commands work here."""
    if sys.platform == "win32":
        return "windows"
    return "linux" if sys.platform.startswith("linux") else "other"


def is_wsl() -> bool:
    try:
        return "microsoft" in Path("/proc/sys/kernel/osrelease").read_text(encoding="ascii").lower()
    except OSError:  # not Linux
        return False


def follow_program(
    arguments: Sequence[str],
    seconds: float,
    log: Callable[[str], None],
    *,
    folder: Path | None = None,
    sent: bytes = b"",
) -> Ran:
    """Run a program that takes minutes: log each line at once, and return the last ones."""
    late = threading.Event()
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    with tempfile.TemporaryFile() as standard_input:  # a file: no thread has to feed a program
        standard_input.write(sent)
        standard_input.seek(0)
        try:
            process = subprocess.Popen(
                list(arguments), stdin=standard_input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
            )
        except FileNotFoundError:
            return Ran(code=127, is_missing=True)

    def end_late() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, end_late)
    timer.daemon = True
    timer.start()
    try:
        assert process.stdout is not None  # noqa: S101  # Popen was given PIPE
        with process.stdout as output:
            for raw in output:
                kept.append(raw.decode(errors="replace").rstrip())
                log(kept[-1])
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    return Ran(code, "\n".join(kept), is_late=late.is_set())
