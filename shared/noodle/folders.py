"""What goes wrong when noodle keeps something on disk, as an error with its cure; knows paths, not what is kept."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from noodle.errors import NotWritable, StartError

# what the system says when it is the disk or the folder, and not what is written or where it comes from
DISK_ERRORS = frozenset(
    {
        errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG,
        errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
    }
)  # fmt: skip


@contextlib.contextmanager
def writing(path: Path, variable: str) -> Iterator[None]:
    """Turn an OSError while `path` is written into NotWritable; `variable` is what moves it to another place."""
    try:
        yield
    except OSError as error:
        raise not_writable(path, variable, error) from error


def not_writable(path: Path, variable: str, error: OSError) -> StartError:
    """The error for a path that the system does not let us write."""
    return NotWritable(
        f"{path} can not be written ({error.strerror or error}).",
        cure=f"Free some space on its disk, or set {variable} to a folder that this user may write.",
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` as a whole, so that no reader sees a part of it; raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(data)
    beside.replace(path)
