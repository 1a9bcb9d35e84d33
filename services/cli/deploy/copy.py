"""The files that another machine needs to build and run its part, as one tar; never secrets, .env or models."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from noodle.errors import ConfigurationError
from services.cli.project.programs import run_program

GIT_SECONDS = 20.0  # git's list of files
# what a machine that only runs noodle does not need
LEFT_OUT = ("tests", "docs", ".ci")
# what git does not track, for a folder without git
NOT_OURS = (
    ".git", ".venv", ".env", "secrets", "models", "out", "build", "dist", "deploy-results",
    "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
)  # fmt: skip
NEVER = (".env", "secrets", "models")  # even if git tracks them
NEEDED = ("docker-compose.yml", "Dockerfile.cpu", "services", "shared")


def files_to_copy(folder: Path) -> list[str]:
    """Return POSIX paths: those that git tracks, or without git all but NOT_OURS. Raises ConfigurationError."""
    ran = run_program(["git", "-C", str(folder), "ls-files", "-z"], GIT_SECONDS)
    if ran.is_good and ran.output:
        names = [name for name in ran.output.split("\0") if name]
    else:
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
        names = [name for name in names if not set(PurePosixPath(name).parts) & set(NOT_OURS)]
    kept = [name for name in names if PurePosixPath(name).parts[0] not in (*LEFT_OUT, *NEVER)]
    kept = sorted(name for name in kept if (folder / name).is_file())
    tops = {PurePosixPath(name).parts[0] for name in kept}
    missing = [name for name in NEEDED if name not in tops]
    if missing:
        raise ConfigurationError(
            f"{folder} holds no {missing[0]}, so it is not noodle's folder.", cure="Go to noodle's folder first."
        )
    return kept


def top_folders(names: Sequence[str]) -> list[str]:
    """Return the folders that the copy replaces as a whole, so that no file of an older version stays."""
    return sorted({PurePosixPath(name).parts[0] for name in names if len(PurePosixPath(name).parts) > 1})


def tar_of(folder: Path, names: Sequence[str]) -> bytes:
    """Return the compressed tar, without owners and times, so that the same files make the same bytes."""
    content = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in names:
            data = (folder / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()
