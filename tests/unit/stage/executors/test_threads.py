"""The threads of a slice: parts are claimed once, results are the same with any number, and idle ones cost nothing."""

import ctypes
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import services.stage.executors
from services.stage.executors.base import PackedBatch, Span
from services.stage.executors.ggml.kernels import threads as graph_threads
from services.stage.executors.ggml.kernels.library import own_library
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import load_by_ggml, need_ggml

PROMPT = [5, 17, 3, 99, 4, 150, 7, 1, 2, 30, 31, 32]

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    need_ggml()
    if own_library() is None and not os.environ.get("CI"):
        pytest.skip("noodle's own library was not built")
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama", hidden_size=256, head_dim=64)


@pytest.fixture
def pool_alone(monkeypatch):
    """Let the pool compute graphs whose attention is large beside their products, too."""
    monkeypatch.setattr(graph_threads, "LARGEST_GGML_SHARE", 1.0)


def load(folder, threads=1):
    return load_by_ggml(folder, 0, 6, weights="q8_0", kv_dtype="f32", context_length=256, threads=threads)


def logits_of(model_slice, session_id="s", steps=3):
    """The logits of a prompt and of some steps after it."""
    found = []
    for number in range(steps):
        ids, first = (PROMPT, 0) if not number else ([number], len(PROMPT) + number - 1)
        batch = PackedBatch(
            (Span(session_id, first, len(ids), 64),), np.array([len(ids) - 1]), token_ids=np.array(ids, np.int64)
        )
        found.append(model_slice.forward(batch).logits.copy())
    return np.concatenate(found)


def test_a_step_has_the_same_bits_with_any_number_of_threads_which_may_change_between_steps(folder, pool_alone):
    model_slice = load(folder)
    expected = logits_of(model_slice)
    for threads in (2, 5, 1, 3):
        model_slice.set_threads(threads)
        for _ in range(5):
            assert np.array_equal(logits_of(model_slice), expected)


def test_two_slices_of_a_process_compute_at_the_same_time_although_there_is_one_pool(folder, pool_alone):
    slices = [load(folder, threads=3) for _ in range(2)]
    expected = logits_of(load(folder))
    found = [[], []]

    def compute(number):
        found[number].extend(logits_of(slices[number]) for _ in range(20))

    together = [threading.Thread(target=compute, args=(number,)) for number in range(2)]
    for each in together:
        each.start()
    for each in together:
        each.join()
    assert all(np.array_equal(logits, expected) for each in found for logits in each)
    assert [len(each) for each in found] == [20, 20]


def test_threads_that_have_nothing_to_compute_use_no_processor_time(folder, pool_alone):
    logits_of(load(folder, threads=4))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        used, begin = time.process_time(), time.monotonic()
        threading.Event().wait(0.2)
        if time.process_time() - used < 0.02 * (time.monotonic() - begin):
            return
    pytest.fail("threads were busy for 10 s without work")


def test_a_forked_process_computes_without_the_threads_that_it_lacks(folder, pool_alone):
    model_slice = load(folder, threads=3)
    expected = logits_of(model_slice)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(logits_of(model_slice), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
