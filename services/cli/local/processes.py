"""How child processes are started, recognised and ended, and how one thread waits for all of them and for signals.

Knows Linux (/proc, sessions, PR_SET_PDEATHSIG), but none of the services. Imports on Windows, where `up` refuses.
"""

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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from msgspec import Struct

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LOOK_AGAIN_SECONDS = 0.05  # between two looks at processes that are not our children: nothing reports their end
SILENCE_SECONDS = 60.0  # between two looks at a pipe that nothing comes from
STATE_FIELD, SESSION_FIELD, START_FIELD = 0, 3, 19  # of /proc/<pid>/stat, counted from the field after the name


class ProcessIdentity(Struct, frozen=True):
    """Which process is meant, beyond its id, which the kernel gives to others later."""

    pid: int
    start_ticks: int  # since the machine's boot
    boot_id: str
    command_line: tuple[str, ...]


def boot_id() -> str:
    """A text that is another one after each boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def command_line(pid: int) -> tuple[str, ...]:
    """The arguments a process was started with; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(part.decode(errors="replace") for part in raw.split(b"\0")[:-1])


def identify(pid: int) -> ProcessIdentity:
    """The identity of a process that runs now; start_ticks 0 when it has already gone."""
    fields = _stat_fields(pid)
    return ProcessIdentity(pid, int(fields[START_FIELD]) if fields else 0, boot_id(), command_line(pid))


def is_running(identity: ProcessIdentity) -> bool:
    """Whether exactly this process still runs (a zombie does not)."""
    fields = _stat_fields(identity.pid)
    return (
        bool(fields)
        and fields[STATE_FIELD] not in "ZX"
        and int(fields[START_FIELD]) == identity.start_ticks
        and identity.boot_id == boot_id()
    )


def session_members(leader_pid: int) -> list[int]:
    """All living processes of the session that `leader_pid` opened."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat_fields(int(entry.name))
            if fields and int(fields[SESSION_FIELD]) == leader_pid and fields[STATE_FIELD] not in "ZX":
                members.append(int(entry.name))
    return members


def leftovers_of(identity: ProcessIdentity) -> list[int]:
    """What still runs of a child that another `noodle up` started: itself and its workers, never a stranger.

    A worker of gunicorn has its master's command line and session and is younger; anything else that has the same
    number by chance differs in one of them.
    """
    if identity.boot_id != boot_id():
        return []
    return [
        pid
        for pid in session_members(identity.pid)
        if command_line(pid) == identity.command_line and identify(pid).start_ticks >= identity.start_ticks
    ]


def end_leftovers(identities: Iterable[ProcessIdentity], grace_seconds: float) -> list[int]:
    """SIGTERM, then after the grace SIGKILL, what another `noodle up` left running; returns the ids it ended."""
    known = list(identities)

    def living() -> list[int]:
        return [pid for identity in known for pid in leftovers_of(identity)]

    ended: set[int] = set()
    for signal_number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, grace_seconds)):
        for pid in living():
            ended.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        if wait_until(lambda: not living(), seconds):
            break
    return sorted(ended)


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Whether the condition came true in time; for what no file descriptor reports."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_AGAIN_SECONDS)
    return True


def wait_for_end(identity: ProcessIdentity, timeout_seconds: float) -> bool:
    """Whether a process that is not our child ended in time."""
    return wait_until(lambda: not is_running(identity), timeout_seconds)


def _die_with_parent(parent_pid: int) -> Callable[[], None]:
    """For preexec_fn: the kernel sends SIGTERM to the child when the thread that started it ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent_pid:  # it ended between fork and prctl
            os._exit(1)

    return set_death_signal


def start_child(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: IO[Any] | int,
    *,
    standard_input: IO[Any] | int = subprocess.DEVNULL,
    errors: IO[Any] | int | None = subprocess.STDOUT,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own (a terminal's Ctrl-C is ours to hand on) that ends when this one does.

    To be called from the main thread: the child dies with the thread that started it. Raises OSError.
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
    """The exit code (minus the signal's number) of a child that has ended, leaving it a zombie; None while it runs.

    While it is a zombie its id can not be given away, so that what is left of its session can safely be killed.
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
    """Send a signal to a child's process group, unless all of it is gone."""
    if process.returncode is None:  # after it was reaped, the number may be a stranger's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal_number)


def last_lines(path: Path, count: int, maximum_bytes: int = 16_384) -> list[str]:
    """The end of a log file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - maximum_bytes))
            return list(deque(file.read().decode(errors="replace").splitlines(), count))
    except FileNotFoundError:
        return []


class Interrupted(Exception):  # not a fault: somebody asked for the end
    """Raised when a stop was asked for before the work was done."""


class Signals:
    """Turns SIGINT, SIGTERM, SIGHUP and SIGCHLD into something one thread can wait for, with files beside them.

    While it is open, Ctrl-C raises nothing: `stop_requests` counts it, and the wait that it meets returns at once.
    """

    HANDLED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD")  # by name: Windows has not all of them

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
        """Whether somebody wants this process to end."""
        return self.stop_requests > 0

    def wait(self, timeout_seconds: float, files: Sequence[IO[bytes]] = ()) -> list[IO[bytes]]:
        """Return when a signal came, a file can be read, or the time is over; gives the readable files."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            for file in files:
                selector.register(file, selectors.EVENT_READ)
            readable = [key.fileobj for key, _ in selector.select(max(0.0, timeout_seconds))]
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(1024):
                continue
        return [file for file in files if file in readable]


def _interrupt() -> None:
    raise Interrupted


def lines_of(
    output: IO[bytes], signals: Signals, on_stop: Callable[[], None] = _interrupt
) -> Generator[bytes, None, None]:
    """Each whole line of a pipe as it comes, until its other end is closed.

    `on_stop` is called once when a stop is asked for meanwhile; it raises Interrupted unless given.
    """
    rest = b""
    is_told = False
    while True:
        if signals.stop_requested and not is_told:
            is_told = True
            on_stop()
        if not signals.wait(SILENCE_SECONDS, [output]):
            continue
        part = os.read(output.fileno(), 65536)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


def usable_cores() -> int:
    """Cores this process may use (a taskset or a container's cpuset counts)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def proportional_set_bytes(pid: int) -> int:
    """Memory of a process with shared pages divided among those who share them; 0 when it can not be read."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0
