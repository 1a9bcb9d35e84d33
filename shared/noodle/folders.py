"""Errors of the disk as NotWritable with its cure, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from noodle.errors import NotWritable, StartError

# errors of the disk or the folder, not of what is written or where it comes from
DISK_ERRORS = frozenset(
    {
        errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG,
        errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
    }
)  # fmt: skip


@contextlib.contextmanager
def writing(path: Path, variable: str) -> Iterator[None]:
    """Turn an OSError while `path` is written into NotWritable; `variable` sets another place."""
    try:
        yield
    except OSError as error:
        raise not_writable(path, variable, error) from error


def not_writable(path: Path, variable: str, error: OSError) -> StartError:
    return NotWritable(
        f"{path} cannot be written ({error.strerror or error}).",
        cure=f"Free some space on its disk, or set {variable} to a folder that this user may write.",
    )


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` as a whole, so that no reader sees a part of it; raises OSError and leaves nothing behind."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is raised
            beside.unlink(missing_ok=True)
        raise
