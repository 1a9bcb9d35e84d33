"""The run folder that `noodle up` holds and writes: its record, secrets and logs.

One `noodle up` at a time per state folder: it locks the run folder, and the kernel releases the lock when it dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import msgspec

from noodle import folders
from noodle.errors import ConfigurationError
from services.cli.client.run_record import RECORD_NAME, TOKEN_NAME, VALKEY_PASSWORD_NAME, RunRecord, run_folder_path


class RunFolder:
    """The paths in a run folder, and its lock if it was acquired."""

    def __init__(self, path: Path, lock_descriptor: int | None = None) -> None:
        self.path = path
        self.token_path = path / TOKEN_NAME
        self.valkey_password_path = path / VALKEY_PASSWORD_NAME
        self.valkey_dir = path / "valkey"
        self.logs_dir = path / "logs"
        self._lock_descriptor = lock_descriptor

    def log_path(self, name: str) -> Path:
        return self.logs_dir / f"{name}.log"

    def write(self, record: RunRecord) -> None:
        """Replace the record atomically. Raises NotWritable."""
        write_private(self.path / RECORD_NAME, msgspec.json.encode(record))

    def empty(self) -> None:
        """Remove what another run left inside; the lock stays. Raises NotWritable."""
        with writing(self.path):
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def remove(self) -> None:
        """Remove the folder, and the state folder if nothing else is in it, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is kept there, or it is a mount
            self.path.parent.rmdir()
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def acquire(state_dir: Path) -> RunFolder | None:
    """Make and lock the run folder; None if another `noodle up` holds it. A killed one may have left files inside.

    Raises ConfigurationError if the folder cannot be made or locked.
    """
    import fcntl  # Windows imports this file but never runs this function

    path = run_folder_path(state_dir)
    while True:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = _open_folder(path)
        except OSError as error:
            raise ConfigurationError(
                f"The state folder {state_dir} cannot be used: {error.strerror}.",
                cure="Set NOODLE_STATE_DIR to a folder that this user may write.",
            ) from error
        if descriptor is None:
            continue  # its last holder removed it between the two
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_still(path, descriptor):
            return RunFolder(path, descriptor)
        os.close(descriptor)  # its last holder removed it while this one took the lock


def _open_folder(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return None


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user may read, whole or not at all. Raises NotWritable."""
    new_path = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            descriptor = os.open(new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            new_path.replace(path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                new_path.unlink(missing_ok=True)
            raise


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an OSError while `path` is written into NotWritable with its cure."""
    return folders.writing(path, "NOODLE_STATE_DIR")
