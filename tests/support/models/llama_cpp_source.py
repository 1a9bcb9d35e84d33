"""Files of llama.cpp's `models` folder: vocabularies with their expected ids, and real chat templates.

They lie in the source of llama-cpp-python on the package index, and are kept beside the prepared models.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.support.models.real_model import cache_dir

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
MEMBERS = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/models/"
DOWNLOAD_SECONDS = 900.0  # 77 MB
# pip asks a source package's build backend for its name; this one answers for it, so that no build tool is installed
BACKEND = f"""
import pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "llama_cpp_python-{VERSION}.dist-info"
    (pathlib.Path(folder) / name).mkdir()
    text = "Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {VERSION}\\n"
    (pathlib.Path(folder) / name / "METADATA").write_text(text)
    return name
"""


def llama_cpp_models() -> Path:
    """Return the folder with `ggml-vocab-*` and `templates/`; skip the test if it is unavailable, fail in CI."""
    fetched = _fetched()
    if isinstance(fetched, Path):
        return fetched
    if os.environ.get("CI"):
        pytest.fail(f"The source of llama-cpp-python is needed in CI: {fetched}")
    pytest.skip(f"The source of llama-cpp-python is not here: {fetched}")


@functools.cache
def _fetched() -> Path | str:
    folder = cache_dir() / "tests" / f"llama-cpp-python-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work_dir:
            if problem := _download(Path(work_dir)):
                return problem
            try:
                (Path(work_dir) / MEMBERS).rename(folder)
            except OSError:  # another run of the tests was first
                if not folder.exists():
                    raise
    return folder


def _download(work_dir: Path) -> str:
    """Unpack the folder below `work_dir`. Returns what went wrong."""
    backend = work_dir / "backend" / "scikit_build_core" / "build.py"
    backend.parent.mkdir(parents=True)
    backend.write_text(BACKEND)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
    command += ["--no-input", "--quiet", "--dest", str(work_dir), f"llama-cpp-python=={VERSION}"]
    environment = {**os.environ, "PYTHONPATH": str(backend.parents[1])}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip took longer than {DOWNLOAD_SECONDS:.0f} s"
    archives = list(work_dir.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        return done.stderr.strip() or f"pip fetched {len(archives)} files"
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != SHA256:
        return "the package index returned another file than expected (sha256 differs)"
    with tarfile.open(archives[0]) as archive:
        wanted = [member for member in archive if member.name.startswith(MEMBERS)]
        archive.extractall(work_dir, wanted, filter="data")
    shutil.rmtree(work_dir / "backend")
    return ""
