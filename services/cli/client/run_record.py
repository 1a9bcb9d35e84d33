"""The record of a running `noodle up`, as other commands read it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
import psutil
from msgspec import Struct

from noodle.errors import ConfigurationError

RECORD_NAME, TOKEN_NAME, VALKEY_PASSWORD_NAME = "run.json", "cluster_token", "valkey_password"

ServicePhase = Literal["running", "restarting", "stopped"]
RunPhase = Literal["starting", "running", "stopping"]


class ProcessIdentity(Struct, frozen=True):
    """A process, identified by more than its id, which the kernel reuses."""

    pid: int
    start_ticks: int  # since the machine booted; 0: it had ended already
    boot_id: str
    command_line: tuple[str, ...]


class ServiceRecord(Struct, frozen=True, kw_only=True):
    """One service as its supervisor sees it."""

    name: str
    port: int
    phase: ServicePhase
    process: ProcessIdentity | None = None
    restarts: int = 0
    last_exit_code: int | None = None


class RunRecord(Struct, frozen=True, kw_only=True):
    """What `status`, `down` and a second `up` know about a running `noodle up`."""

    supervisor: ProcessIdentity
    coordinator_url: str
    model: str
    stage_count: int
    phase: RunPhase
    model_path: str = ""  # empty until the model is prepared
    services: tuple[ServiceRecord, ...] = ()


def identify(pid: int) -> ProcessIdentity:
    try:
        process = psutil.Process(pid)
        return ProcessIdentity(pid, _start_ticks(process), boot_id(), tuple(process.cmdline()))
    except psutil.Error:
        return ProcessIdentity(pid, 0, boot_id(), ())


def is_running(identity: ProcessIdentity) -> bool:
    """Return whether exactly this process still runs; a zombie does not."""
    try:
        process = psutil.Process(identity.pid)
        is_same = _start_ticks(process) == identity.start_ticks and identity.boot_id == boot_id()
        return is_same and is_alive(process)
    except psutil.Error:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is no zombie; raises psutil.NoSuchProcess when it has gone."""
    return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def boot_id() -> str:
    """Return an id that changes with each boot of this machine; psutil does not know it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start_ticks(process: psutil.Process) -> int:
    """Ticks since boot: unlike the time of day they stay the same when the clock is set."""
    seconds: float = process.create_time() - psutil.boot_time()
    return round(seconds * os.sysconf("SC_CLK_TCK"))


def run_folder_path(state_dir: Path) -> Path:
    return state_dir / "run"


def read_record(run_folder: Path) -> RunRecord | None:
    """Return the last record, None if there is none or only part of one. Raises ConfigurationError if unreadable."""
    path = run_folder / RECORD_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunRecord)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}).",
            cure="Run this as the user who started it, or set NOODLE_STATE_DIR to another folder.",
        ) from error


def running(state_dir: Path) -> RunRecord | None:
    """Return the record of the `noodle up` that runs on this state folder, or None."""
    record = read_record(run_folder_path(state_dir))
    return record if record is not None and is_running(record.supervisor) else None
