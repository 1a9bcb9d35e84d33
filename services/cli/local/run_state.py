"""The folder that a running `noodle up` keeps: who it is, its secrets, its logs; knows neither what it starts nor why.

One `noodle up` at a time per state folder: it holds a lock on the run folder, which the kernel gives back when it dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from noodle import folders
from noodle.errors import ConfigurationError
from services.cli.local.processes import ProcessIdentity, is_running

ServicePhase = Literal["running", "restarting", "stopped"]
RunPhase = Literal["starting", "running", "stopping"]


class ServiceRecord(Struct, frozen=True):
    """One service as its supervisor sees it."""

    name: str
    port: int
    phase: ServicePhase
    process: ProcessIdentity | None = None
    restarts: int = 0
    last_exit_code: int | None = None


class RunRecord(Struct, frozen=True):
    """What `noodle status`, `down` and a second `up` know of a running `noodle up`."""

    supervisor: ProcessIdentity
    coordinator_url: str
    model: str
    stage_count: int
    phase: RunPhase
    model_folder: str = ""  # empty until the model is prepared
    services: tuple[ServiceRecord, ...] = ()


class RunFolder:
    """The paths inside a run folder, and the lock on it when it was acquired."""

    def __init__(self, path: Path, lock_descriptor: int | None = None) -> None:
        self.path = path
        self.record_path = path / "run.json"
        self.token_path = path / "cluster_token"
        self.valkey_password_path = path / "valkey_password"
        self.valkey_dir = path / "valkey"
        self.logs_dir = path / "logs"
        self._lock_descriptor = lock_descriptor

    def log_path(self, name: str) -> Path:
        """Where a service's output goes."""
        return self.logs_dir / f"{name}.log"

    def read(self) -> RunRecord | None:
        """What was last written, or None when there is nothing whole; raises ConfigurationError if it is not ours."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=RunRecord)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None
        except OSError as error:
            raise ConfigurationError(
                f"{self.record_path} can not be read ({error.strerror}).",
                cure="Run this as the user who started it, or set NOODLE_STATE_DIR to another folder.",
            ) from error

    def write(self, record: RunRecord) -> None:
        """Replace the record at once: a reader sees the old one or the new one. Raises NotWritable."""
        write_private(self.record_path, msgspec.json.encode(record))

    def empty(self) -> None:
        """Remove what is inside, as another run left it; the lock stays. Raises NotWritable."""
        with writing(self.path):
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def remove(self) -> None:
        """Remove the folder, the state folder when nothing else is in it, and give the lock back."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is kept there, or it is a mount
            self.path.parent.rmdir()
        self.release()

    def release(self) -> None:
        """Give the lock back and leave the folder."""
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def run_folder_path(state_dir: Path) -> Path:
    """Where the run folder of a state folder is."""
    return state_dir / "run"


def acquire(state_dir: Path) -> RunFolder | None:
    """Make and lock the run folder; None when another `noodle up` holds it. What is inside may be a dead one's.

    Raises ConfigurationError when the folder can not be made or locked.
    """
    import fcntl  # not on Windows, where this file is imported but never gets here

    path = run_folder_path(state_dir)
    while True:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # its last holder removed it between the two
            continue
        except OSError as error:
            raise ConfigurationError(
                f"The state folder {state_dir} can not be used: {error.strerror}.",
                cure="Set NOODLE_STATE_DIR to a folder this user may write.",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_still(path, descriptor):
            return RunFolder(path, descriptor)
        os.close(descriptor)  # its last holder removed it while this one took the lock


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def running(state_dir: Path) -> RunRecord | None:
    """The record of the `noodle up` that runs on this state folder, or None."""
    record = RunFolder(run_folder_path(state_dir)).read()
    return record if record is not None and is_running(record.supervisor) else None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user may read, whole or not at all; raises NotWritable."""
    new_path = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            descriptor = os.open(new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            new_path.replace(path)
        except OSError:
            with contextlib.suppress(OSError):  # the first one is told
                new_path.unlink(missing_ok=True)
            raise


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """For what writes in the state folder: what the system says becomes NotWritable with its cure."""
    return folders.writing(path, "NOODLE_STATE_DIR")
