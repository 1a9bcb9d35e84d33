"""The worker's core is kept awake while a next step is likely, by a thread that gives way to all others."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from noodle.metrics.machine import ContainerUse, container_use
from services.stage.executors.ggml.kernels import own_library
from services.stage.worker.staying_awake import CoreAwake, _started_library

WAIT_SECONDS = 0.2
LONG_SECONDS = 30.0
PATIENCE_SECONDS = 10.0


@pytest.fixture
def core():
    """One that keeps awake for long, so that a test says when it ends."""
    found = own_library(keeps_lock=True)
    if found is None and not os.environ.get("CI"):
        pytest.skip("noodle's own library was not built")
    assert found is not None
    if container_use().core_limit is not None:
        pytest.skip("the CPU time of this container is limited")
    core = CoreAwake(awake_seconds=LONG_SECONDS)
    core.computed()
    yield core
    core.end()


def idle_threads():
    """Threads of this process with the lowest priority."""
    tasks = Path("/proc/self/task").iterdir()
    return [task for task in tasks if os.sched_getscheduler(int(task.name)) == os.SCHED_IDLE]


def ticks(task):
    """Of CPU time that a thread has had, 100 a second."""
    fields = (task / "stat").read_text().rpartition(")")[2].split()  # from the third on: a name may have spaces
    return sum(map(int, fields[11:13]))


def ticks_while_waiting(task):
    before = ticks(task)
    time.sleep(WAIT_SECONDS)
    return ticks(task) - before


def test_one_thread_of_the_lowest_priority_does_it_however_many_workers_there_are(core):
    another = CoreAwake()
    another.computed()
    assert len(idle_threads()) == 1


def test_it_spins_while_the_worker_waits_and_no_longer(core):
    (task,) = idle_threads()
    before, deadline = ticks(task), time.monotonic() + PATIENCE_SECONDS
    core.begin()
    while ticks(task) == before:  # others on this core go first
        assert time.monotonic() < deadline
        time.sleep(0.01)
    core.end()
    time.sleep(0.05)  # the tick in which it ended may count
    assert ticks_while_waiting(task) == 0


def test_it_is_on_the_core_of_the_worker(core):
    (task,) = idle_threads()
    everywhere = os.sched_getaffinity(0)
    try:
        for cpu in sorted(everywhere):
            os.sched_setaffinity(0, {cpu})
            core.begin()
            deadline = time.monotonic() + PATIENCE_SECONDS
            while os.sched_getaffinity(int(task.name)) != {cpu}:
                assert time.monotonic() < deadline
                time.sleep(0.001)  # the thread moves itself, and tells nobody
            core.end()
            time.sleep(0.01)  # until it has seen that: it asks for its core when it begins anew
    finally:
        os.sched_setaffinity(0, everywhere)


def test_it_ends_by_itself_when_no_step_comes(core):
    (task,) = idle_threads()
    short = CoreAwake(awake_seconds=0.05)
    short.computed()
    short.begin()
    time.sleep(0.15)
    assert ticks_while_waiting(task) == 0
    short.begin()  # the time is over: nothing was computed since
    assert ticks_while_waiting(task) == 0


def test_another_thread_on_the_same_core_loses_nothing_to_it(core):
    """A thread of usual priority has the core when it wants it: so long as it counts, the idle one has hardly any."""
    (task,) = idle_threads()
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        core.begin()
        before, begun = ticks(task), time.thread_time()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            pass
        mine = time.thread_time() - begun
        assert (ticks(task) - before) / 100 < 0.2 * mine
    finally:
        core.end()
        os.sched_setaffinity(0, everywhere)


def test_nothing_is_started_before_a_step_or_where_it_is_not_wanted():
    waits, unwanted = CoreAwake(), CoreAwake(is_wanted=False)
    unwanted.computed()
    for core in (waits, unwanted):
        core.begin()
        core.end()
        assert core._library is None


def test_a_container_of_limited_cpu_time_does_not_spend_it_on_waiting(tmp_path, monkeypatch):
    assert container_use(tmp_path).core_limit is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for name, content, limit in (
        ("cpu/cpu.cfs_quota_us", "-1\n", None),
        ("cpu/cpu.cfs_quota_us", "150000\n", 1.5),
        ("cpu.max", "max 100000\n", None),
        ("cpu.max", "150000 100000\n", 1.5),
    ):
        (tmp_path / name).write_text(content)
        assert container_use(tmp_path).core_limit == limit
    monkeypatch.setattr("services.stage.worker.staying_awake.container_use", lambda: ContainerUse(core_limit=1.5))
    assert _started_library.__wrapped__() is None


@pytest.mark.parametrize("lacks", ["library", "priority"])
def test_what_it_needs_and_lacks_only_lets_the_core_sleep(lacks, monkeypatch):
    def refuses():
        return False

    library = None if lacks == "library" else SimpleNamespace(noodle_awake_start=refuses)
    monkeypatch.setattr("services.stage.worker.staying_awake.container_use", ContainerUse)
    monkeypatch.setattr("services.stage.worker.staying_awake.own_library", lambda **_: library)
    assert _started_library.__wrapped__() is None
