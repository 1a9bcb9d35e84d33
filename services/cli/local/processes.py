"""Child processes on Linux: starting, recognising and ending them, and waiting for them and for signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from services.cli.client.run_record import ProcessIdentity, RunRecord, boot_id, identify, is_alive

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LEFTOVER_GRACE_SECONDS = 12.0  # from SIGTERM to SIGKILL for what a killed `up` left; gunicorn gives open requests 10
LOOK_AGAIN_SECONDS = 0.05  # between two looks at processes that are not our children


def session_members(leader_pid: int) -> list[int]:
    """Return all living processes of the session that `leader_pid` opened."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(pid) == leader_pid and is_alive(psutil.Process(pid)):
                members.append(pid)
    return members


def leftovers_of(identity: ProcessIdentity) -> list[int]:
    """Return what still runs of a child of another `noodle up`: itself and its workers, never a stranger.

    A gunicorn worker has its master's command line and session and is younger. Any other process that happens to have
    the same id differs in one of them.
    """
    if identity.boot_id != boot_id():
        return []
    found = map(identify, session_members(identity.pid))
    return [
        each.pid
        for each in found
        if each.command_line == identity.command_line and each.start_ticks >= identity.start_ticks
    ]


def end_leftovers(record: RunRecord) -> list[int]:
    """Send SIGTERM, and SIGKILL after the grace, to what another `noodle up` left running; return the ended ids."""

    def living() -> list[int]:
        return [pid for each in record.services if each.process is not None for pid in leftovers_of(each.process)]

    ended: set[int] = set()
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for pid in living():
            ended.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        if wait_until(lambda: not living(), LEFTOVER_GRACE_SECONDS):
            break
    return sorted(ended)


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Return whether the condition came true in time; for events that no file descriptor reports."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_AGAIN_SECONDS)
    return True


def _die_with_parent(parent_pid: int) -> Callable[[], None]:
    """Return a preexec_fn: the kernel sends SIGTERM to the child when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent_pid:  # the parent ended between fork and prctl
            os._exit(1)

    return set_death_signal


def python_module(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command for a module of the installed project; -P ignores a `services` folder in the current one."""
    return (sys.executable, "-P", "-m", name, *arguments)


def start_child(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: IO[Any] | int,
    *,
    standard_input: IO[Any] | int = subprocess.DEVNULL,
    errors: IO[Any] | int | None = subprocess.STDOUT,
) -> subprocess.Popen[bytes]:
    """Start a process in its own session, out of reach of a terminal's Ctrl-C, that ends when this process ends.

    Call it in the main thread: the child dies with the thread that started it. Raises OSError.
    """
    return subprocess.Popen(
        arguments,
        env=dict(environment),
        stdin=standard_input,
        stdout=output,
        stderr=errors,
        start_new_session=True,
        preexec_fn=_die_with_parent(os.getpid()),  # safe: this process runs one thread
    )


def exit_code_without_reaping(process: subprocess.Popen[bytes]) -> int | None:
    """Return a child's exit code (minus the signal's number), None while it runs, and leave it a zombie.

    A zombie's id cannot be reused, so the rest of its session can be killed safely.
    """
    if process.returncode is not None:
        return process.returncode
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return process.poll()
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def end_group(process: subprocess.Popen[bytes], signal_number: int) -> None:
    """Send a signal to a child's process group, unless all of it has gone."""
    if process.returncode is None:  # after it was reaped, the id may be a stranger's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal_number)


def last_lines(path: Path, count: int, maximum_bytes: int = 16_384) -> list[str]:
    """Return the end of a log file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - maximum_bytes))
            return list(deque(file.read().decode(errors="replace").splitlines(), count))
    except FileNotFoundError:
        return []


class Interrupted(KeyboardInterrupt):
    """Raised when a stop was requested before the work was done."""


class Signals:
    """Turns SIGINT, SIGTERM, SIGHUP and SIGCHLD into something that one thread can wait for, together with files.

    While it is open, Ctrl-C raises nothing: `stop_requests` counts it, and the current wait returns at once.
    """

    HANDLED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD")  # by name: Windows lacks some

    def __init__(self) -> None:
        self.stop_requests = 0
        self.last_signal = 0

    def __enter__(self) -> Signals:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {name: signal.signal(getattr(signal, name), self._note) for name in self.HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._old_handlers.items():
            signal.signal(getattr(signal, name), handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._receiver.close()
        self._sender.close()

    def _note(self, number: int, _frame: object) -> None:
        if number != getattr(signal, "SIGCHLD", None):
            self.stop_requests += 1
            self.last_signal = number

    @property
    def stop_requested(self) -> bool:
        return self.stop_requests > 0

    def raise_if_stopped(self) -> None:
        if self.stop_requested:
            raise Interrupted

    def wait(self, timeout_seconds: float, files: Sequence[IO[bytes]] = ()) -> list[IO[bytes]]:
        """Wait for a signal, a readable file or the timeout; return the readable files."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            for file in files:
                selector.register(file, selectors.EVENT_READ)
            readable = [key.fileobj for key, _ in selector.select(max(0.0, timeout_seconds))]
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(1024):
                continue
        return [file for file in files if file in readable]


def proportional_set_bytes(pid: int) -> int:
    """Return a process's memory, shared pages divided among their users; 0 if it cannot be read."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.Error:
        return 0
