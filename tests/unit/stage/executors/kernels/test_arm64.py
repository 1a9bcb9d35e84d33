"""noodle's kernels compiled for arm64 and run under emulation give the bits that they give on x86.

The programs in tests/support/kernels draw weights, activations and tokens, and print the bits of all results. They need
no ggml, which is not built for arm64 here.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from services.stage.executors.ggml.backend import folder_of_libraries
from services.stage.executors.ggml.kernels.library import LIBRARY_NAME, own_library
from tests.support.stages.executors import need_ggml
from tests.support.stages.ggml_operation import needed

ROOT = Path(__file__).resolve().parents[5]
KERNELS, PROGRAMS = ROOT / "services/stage/executors/kernels", ROOT / "tests/support/kernels"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # arm64's C library, of Debian's packages
WARNINGS = ("-Wall", "-Wextra", "-Werror")
COMPILE_TIMEOUT_SECONDS = 300
RUN_TIMEOUT_SECONDS = 120
MISSING = 77  # the programs' exit status on a processor that lacks the instructions


def _run(*words):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _flags():
    """What the library is compiled with on every machine."""
    found = re.search(r"CC:-cc\} (-O.*?) -o ", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert found
    return found[1].split()


@pytest.fixture(scope="module")
def arm64_library(tmp_path_factory):
    """libnoodle.so for arm64, from all sources."""
    missing = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
    if missing and os.environ.get("CI"):
        pytest.fail(f"needed in CI: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("arm64")
    flags = [flag for flag in _flags() if flag != "-shared"]
    sources = sorted(KERNELS.rglob("*.c"), key=lambda path: path.stat().st_size, reverse=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [
            pool.submit(_run, COMPILER, *flags, *WARNINGS, "-c", source, "-o", to)
            for source, to in zip(sources, objects, strict=True)
        ]
        for each in compiled:
            each.result()
    library = folder / LIBRARY_NAME
    _run(COMPILER, *_flags(), *WARNINGS, *objects, "-o", library)
    return library


def _program(compiler, name, instructions, library, folder):
    to = folder / f"{name}-{instructions}"
    includes = (f"-I{KERNELS}", f"-I{PROGRAMS}", f"-DINSTRUCTIONS={instructions}")
    _run(
        compiler, "-O2", *WARNINGS, *includes, PROGRAMS / f"{name}.c", library, f"-Wl,-rpath,{library.parent}", "-o", to
    )
    return to


def _results(text):
    return {name: numbers.split() for name, numbers in (line.split(":") for line in text.splitlines())}


def _emulated(program, processor):
    return subprocess.run(
        [EMULATOR, "-cpu", processor, "-L", SYSTEM, str(program)],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_SECONDS,
    )


@pytest.mark.parametrize("name", ["products", "attention"])
def test_arm64_gives_the_bits_of_x86(name, arm64_library, tmp_path):
    """For every type: rows taken, products with 1, 2, 3 and 17 rows; attention in chunks and of lone tokens."""
    need_ggml()
    needed(own_library, {"avx2", "fma", "f16c"})
    native = _program("cc", name, "avx2", folder_of_libraries() / LIBRARY_NAME, tmp_path)
    done = _emulated(_program(COMPILER, name, "neon", arm64_library, tmp_path), "max")
    assert done.returncode == 0, done.stderr
    found, expected = _results(done.stdout), _results(_run(native))
    assert found.keys() == expected.keys()
    different = [line for line, bits in expected.items() if found[line] != bits]
    assert not different
    assert len({bits for line in expected.values() for bits in line}) > 5000, "these are not drawn numbers"


def test_an_arm64_without_the_dot_product_is_known_by_the_library(arm64_library, tmp_path):
    program = _program(COMPILER, "products", "neon", arm64_library, tmp_path)
    assert _emulated(program, "cortex-a72").returncode == MISSING
    assert _emulated(program, "cortex-a76").returncode == 0


def test_a_processor_of_x86_does_not_claim_arm64s_instructions():
    need_ggml()
    library = needed(own_library, {"avx2"})
    assert not library.noodle_has_neon() & 1
