"""noodle's own C functions are loaded where they were built, and missed without harm where they were not."""

import ctypes
import importlib.machinery
import logging
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import services.stage.executors
from services.stage.executors.ggml.kernels.library import LIBRARY_NAME, own_library


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package named ggml that has a folder of libraries."""
    spec = importlib.machinery.ModuleSpec("ggml", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("services.stage.executors.ggml.backend.importlib.util.find_spec", lambda _: spec)
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


def test_it_is_built_where_ggml_is():
    library = own_library()
    if library is None and not os.environ.get("CI"):
        pytest.skip("noodle's own library was not built")
    assert library is not None


def test_where_it_was_not_built_there_is_none(package):
    assert own_library() is None


def test_where_ggml_is_not_installed_there_is_none(monkeypatch):
    monkeypatch.setattr("services.stage.executors.ggml.backend.importlib.util.find_spec", lambda _: None)
    assert own_library() is None


def test_one_that_can_not_be_loaded_is_named_and_missed(package, caplog):
    (package / LIBRARY_NAME).write_bytes(b"no library")
    with caplog.at_level(logging.WARNING):
        assert own_library() is None
    assert str(package / LIBRARY_NAME) in caplog.text


PARTS = """
#include "work.h"

void take(void *work, int threads, int64_t count, int *taken) {
    struct claims claims = claims_of(work, threads);
    for (int64_t part; (part = claim_next(&claims, count)) < count;)
        __atomic_fetch_add(taken + part, 1, __ATOMIC_RELAXED);
}
"""


@pytest.fixture(scope="module")
def take(tmp_path_factory):
    """A function that claims parts as an operation does, and counts for each part how often it was claimed."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("work")
    (folder / "parts.c").write_text(PARTS)
    kernels = Path(services.stage.executors.__file__).parent / "kernels"
    command = [compiler, "-O2", "-shared", "-fPIC", f"-I{kernels}", "-o", str(folder / "parts.so")]
    subprocess.run([*command, str(folder / "parts.c")], check=True)
    function = ctypes.CDLL(str(folder / "parts.so")).take
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)
    return function


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 100_000])
def test_each_part_is_claimed_once_by_any_number_of_threads_and_again_in_the_next_computation(take, threads, count):
    work = (ctypes.c_int64 * 2)()
    for _ in range(3):
        taken = (ctypes.c_int * (count + threads))()
        together = [
            threading.Thread(target=take, args=(ctypes.addressof(work), threads, count, ctypes.addressof(taken)))
            for _ in range(threads)
        ]
        for each in together:
            each.start()
        for each in together:
            each.join()
        assert list(taken) == [1] * count + [0] * threads
        assert list(work) == [0, 0]


def test_a_lone_thread_needs_no_shared_memory(take):
    taken = (ctypes.c_int * 4)()
    take(None, 1, 3, ctypes.addressof(taken))
    assert list(taken) == [1, 1, 1, 0]
