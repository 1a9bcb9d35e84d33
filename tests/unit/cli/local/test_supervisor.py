from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from noodle.errors import ConfigurationError
from services.cli.client.run_record import identify, is_running
from services.cli.local.processes import Signals, leftovers_of
from services.cli.local.run_folder import RunFolder, acquire
from services.cli.local.supervisor import HEALTHY_SECONDS, LOG_LIMIT_BYTES, Ended, ServiceSpec, Supervisor
from tests.support.processes.up_runs import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux")

WAITS = (sys.executable, "-c", "import signal; signal.pause()")
ENDS = (sys.executable, "-c", "print('last words'); raise SystemExit(7)")


class Supervised:
    """A supervisor under a clock that only a test moves."""

    def __init__(self, folder: RunFolder, signals: Signals) -> None:
        self.now_seconds = 0.0
        self.signals = signals
        self.supervisor = Supervisor(folder, lambda: self.now_seconds)

    def add(self, arguments: tuple[str, ...], name: str = "one", rank: int = 0) -> int:
        self.supervisor.add(ServiceSpec(name=name, arguments=arguments, environment={}, port=0, stop_rank=rank))
        return self.pid(name)

    def pid(self, name: str = "one") -> int:
        record = next(record for record in self.supervisor.records() if record.name == name)
        assert record.process is not None
        return record.process.pid

    def next_end(self) -> Ended:
        found: list[Ended] = []
        wait_for(lambda: found.extend(self.supervisor.look()[0]) or found, "a service to end")
        return found[0]

    def restart(self, after_seconds: float) -> None:
        self.now_seconds += after_seconds
        assert self.supervisor.look()[1] == ["one"]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    with Signals() as signals:
        one = Supervised(RunFolder(tmp_path), signals)
        yield one
        one.supervisor.stop(signals)


def test_a_dead_service_comes_back_later_each_time_and_at_most_ten_seconds(supervised: Supervised) -> None:
    supervised.add(ENDS)
    delays = []
    for _ in range(8):
        end = supervised.next_end()
        assert (end.exit_code, end.log_lines[-1]) == (7, "last words")
        delays.append(end.delay_seconds)
        assert supervised.supervisor.look() == ([], [])  # not before its time
        assert supervised.supervisor.seconds_until_restart() == pytest.approx(end.delay_seconds)
        supervised.restart(end.delay_seconds + 0.001)
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_a_minute_of_health_is_a_new_beginning(supervised: Supervised) -> None:
    supervised.add(ENDS)
    for _ in range(3):
        supervised.restart(supervised.next_end().delay_seconds + 0.001)
    wait_for(lambda: not is_running(supervised.supervisor.records()[0].process), "the end")  # type: ignore[arg-type]
    supervised.now_seconds += HEALTHY_SECONDS
    assert supervised.next_end().delay_seconds == 0.2


def test_the_signal_that_killed_a_service_is_named(supervised: Supervised) -> None:
    os.kill(supervised.add(WAITS), signal.SIGKILL)
    assert supervised.next_end().text() == "one was ended by SIGKILL"


def test_ranks_end_one_after_the_other(supervised: Supervised, tmp_path: Path) -> None:
    note = (
        "import signal, sys, pathlib\n"
        "def stop(*_):\n"
        f"    with open({str(tmp_path / 'order')!r}, 'a') as file: print(sys.argv[1], file=file)\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(tmp_path)!r}, sys.argv[1] + '.up').touch()\n"
        "while True: signal.pause()\n"
    )
    for name, rank in (("last", 2), ("first", 0), ("middle", 1)):
        supervised.add((sys.executable, "-c", note, name), name, rank)
        wait_for((tmp_path / f"{name}.up").exists, name)
    assert supervised.supervisor.stop(supervised.signals) == []
    assert (tmp_path / "order").read_text().split() == ["first", "middle", "last"]


def test_a_log_that_has_become_too_long_is_moved_aside(supervised: Supervised, tmp_path: Path) -> None:
    supervised.add(WAITS)
    log = tmp_path / "logs" / "one.log"
    os.truncate(log, LOG_LIMIT_BYTES + 1)
    supervised.supervisor.limit_logs()
    assert log.stat().st_size == 0
    assert (tmp_path / "logs" / "one.log.1").stat().st_size == LOG_LIMIT_BYTES + 1


def test_a_process_is_known_by_more_than_its_number(supervised: Supervised) -> None:
    identity = identify(supervised.add(WAITS))
    assert leftovers_of(identity) == [identity.pid]
    for changed in (
        type(identity)(identity.pid, identity.start_ticks, "another boot", identity.command_line),
        type(identity)(identity.pid, identity.start_ticks + 1, identity.boot_id, identity.command_line),
        type(identity)(identity.pid, identity.start_ticks, identity.boot_id, ("another", "program")),
    ):
        assert leftovers_of(changed) == []


def test_only_one_holds_a_run_folder(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    first = acquire(state_dir)
    assert first is not None
    assert acquire(state_dir) is None
    first.remove()
    assert not state_dir.exists()
    second = acquire(state_dir)
    assert second is not None
    second.remove()


def test_a_state_folder_that_cannot_be_made_ends_the_start_and_names_the_variable() -> None:
    with pytest.raises(ConfigurationError, match="/proc/none cannot be used") as refused:
        acquire(Path("/proc/none"))
    assert "NOODLE_STATE_DIR" in refused.value.cure


def test_a_service_that_cannot_be_started_again_is_tried_later_and_later(supervised: Supervised) -> None:
    supervised.add(ENDS)
    supervised.next_end()
    spec = supervised.supervisor._services[0].spec
    supervised.supervisor._services[0].spec = replace(spec, arguments=("/nowhere/at/all",))
    delays = []
    for _ in range(3):
        supervised.now_seconds += HEALTHY_SECONDS
        (end,), started = supervised.supervisor.look()
        assert (end.exit_code, started) == (None, [])
        assert end.text() == "one could not be started (No such file or directory)"
        delays.append(end.delay_seconds)
    assert delays == [0.4, 0.8, 1.6]
    supervised.supervisor._services[0].spec = spec
    supervised.restart(2.0)


def test_a_log_that_no_disk_has_room_to_keep_is_emptied_and_reported(
    supervised: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervised.add(WAITS)
    path = tmp_path / "logs" / "one.log"
    os.truncate(path, LOG_LIMIT_BYTES + 1)

    def full_disk(_source: Path, target: Path) -> None:
        target.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    assert supervised.supervisor.limit_logs() == ["one"]
    assert [entry.name for entry in path.parent.iterdir()] == ["one.log"]
    assert path.stat().st_size == 0
    assert supervised.supervisor.limit_logs() == []
