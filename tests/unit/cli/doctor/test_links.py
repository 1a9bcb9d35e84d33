"""What `noodle doctor` concludes from probes of other services, and its report; facts as values, no network."""

import threading
import time

import msgspec
import pytest

from noodle.errors import NoodleError, RequestTimedOut
from noodle.web.connectivity import ConnectionResult, ConnectivityReport, Target, try_all
from services.cli.doctor.capacity import Planned, check_plan
from services.cli.doctor.command import check_links
from services.cli.doctor.context import MachineContext
from services.cli.doctor.links import (
    CLOCK_SECONDS,
    SLOW_BYTES_PER_SECOND,
    SLOW_ROUND_TRIP_SECONDS,
    Here,
    check_digests,
    check_reached,
    check_versions,
    check_way_back,
)
from services.cli.doctor.probes import Job, Links
from services.cli.doctor.results import Report, error, ok, skipped, text_of, warning

HERE = Here(machine="machine-a", system="linux", version="0.1.0", host="192.168.1.101", is_running=True)
STAGE_1 = ConnectionResult(
    "stage 1",
    "http://192.168.1.102:8081",
    outcome="open",
    machine="machine-b",
    version="0.1.0",
    model_digest="d" * 64,
    round_trip_seconds=0.0004,
    bytes_per_second=110e6,
    clock_ahead_seconds=0.2,
)
TARGETS = (Target("coordinator", "http://192.168.1.101:8080"), Target("stage 1", STAGE_1.url))


def changed(**changes):
    return msgspec.structs.replace(STAGE_1, **changes)


def statuses(results):
    return [result.status for result in results]


def test_a_peer_that_answers_fast_is_in_order():
    assert statuses(check_reached(STAGE_1, HERE)) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("outcome", "says", "cure"),
    [
        ("refused", "nothing listens", "docker compose up -d"),
        ("silent", "a firewall drops the packets", "ping 192.168.1.102"),
        ("no_way", "no route to it", "ping 192.168.1.102"),
        ("no_such_name", "does not resolve", "getent hosts"),
        ("locked", "refuses the cluster token", "init --machine b --join"),
        ("foreign", "another version", "docker compose up -d --build"),
    ],
)
def test_each_way_not_to_be_reached_is_recognised_with_its_cure(outcome, says, cure):
    (finding,) = check_reached(changed(outcome=outcome, detail="another version"), HERE)
    assert finding.status == "error"
    assert says in finding.what
    assert cure in finding.cure
    assert finding.why


def test_a_valkey_without_a_password_is_an_error():
    (finding,) = check_reached(ConnectionResult("valkey", "redis://192.168.1.101:6379", outcome="unlocked"), HERE)
    assert finding.status == "error"
    assert "without a password" in finding.what


def test_before_this_machine_runs_a_refusal_is_only_a_warning():
    before = msgspec.structs.replace(HERE, is_running=False)
    assert statuses(check_reached(changed(outcome="refused"), before)) == ["warning"]
    assert statuses(check_reached(changed(outcome="silent"), before)) == ["error"]


def test_a_link_as_slow_as_wifi_is_reported_with_its_figures():
    slow = changed(round_trip_seconds=SLOW_ROUND_TRIP_SECONDS * 2, bytes_per_second=SLOW_BYTES_PER_SECOND / 6)
    finding = next(result for result in check_reached(slow, HERE) if result.check == "speed")
    assert finding.status == "warning"
    assert "4.0 ms" in finding.what
    assert "5.0 MB/s" in finding.what
    assert "cable" in finding.cure


def test_the_own_services_speed_and_clock_are_not_judged():
    own = changed(url="http://192.168.1.101:8081", round_trip_seconds=1.0, clock_ahead_seconds=100.0)
    assert statuses(check_reached(own, HERE)) == ["ok"]


@pytest.mark.parametrize(("ahead_seconds", "way"), [(CLOCK_SECONDS + 1, "ahead of"), (-CLOCK_SECONDS - 1, "behind")])
def test_a_clock_that_is_off_is_a_warning(ahead_seconds, way):
    finding = next(
        each for each in check_reached(changed(clock_ahead_seconds=ahead_seconds), HERE) if each.check == "clock"
    )
    assert finding.status == "warning"
    assert way in finding.what


def test_the_way_back_is_reported_by_the_other_service():
    report = ConnectivityReport("stage 1", "machine-b", "0.1.0", "", (changed(name="stage 0", machine="machine-a"),))
    assert statuses(check_way_back(report, {}, HERE)) == ["ok"]
    blocked = ConnectivityReport("stage 1", "machine-b", "0.1.0", "", (changed(name="coordinator", outcome="silent"),))
    (finding,) = check_way_back(blocked, {}, HERE)
    assert (finding.status, finding.where) == ("error", "machine-b")
    slow = changed(name="coordinator", machine="", bytes_per_second=1e6)
    report = ConnectivityReport("stage 1", "machine-b", "0.1.0", "", (slow,))
    assert statuses(check_way_back(report, {"coordinator": "machine-a"}, HERE)) == ["ok", "warning"]
    assert statuses(check_way_back(report, {"coordinator": "machine-b"}, HERE)) == ["ok"]


def test_another_version_and_other_weights_are_errors():
    assert check_versions([("stage 0", "0.1.0"), ("stage 1", "")], HERE).status == "ok"
    finding = check_versions([("stage 0", "0.1.0"), ("stage 1", "0.2.0")], HERE)
    assert finding.status == "error"
    assert "stage 1 has 0.2.0" in finding.what
    assert check_versions([], HERE).status == "skipped"
    assert check_digests([("stage 0", "a" * 64), ("stage 1", "a" * 64)], HERE).status == "ok"
    assert check_digests([("stage 0", "a" * 64), ("stage 1", "b" * 64)], HERE).status == "error"
    assert check_digests([("stage 0", "a" * 64), ("stage 1", "")], HERE).status == "skipped"


def machine_context(**changes):
    given = {
        "role": "a",
        "machine": "machine-a",
        "system": "linux",
        "project": None,
        "host": "192.168.1.101",
        "coordinator_url": TARGETS[0].url,
        "targets": TARGETS,
        "own_names": frozenset({"coordinator"}),
        "is_alone": False,
        "token": "t",
    }
    return MachineContext(**{**given, **changes})


def test_a_stage_that_registered_itself_as_localhost_is_reported_with_its_machine():
    wrong = changed(url="http://localhost:8081", outcome="refused")
    report = ConnectivityReport("coordinator", "machine-a", "0.1.0", "", (wrong,))
    results = check_links(machine_context(), Links((), (report,)))
    (finding,) = [result for result in results if result.check == "address"]
    assert (finding.status, finding.where) == ("error", "machine-b")
    assert "localhost means the machine that uses it" in finding.what


def test_a_lock_that_cannot_be_tried_for_want_of_the_secret_is_skipped():
    results = check_links(machine_context(token=""), Links((changed(outcome="locked"),)))
    assert [result.check for result in results if result.status == "skipped"] == [
        "lock",
        "way back",
        "version",
        "weights",
    ]


def test_a_service_that_does_not_say_whom_it_reaches_is_skipped_with_the_reason():
    results = check_links(machine_context(), Links((STAGE_1,), (), (("stage 1", "Another doctor is being answered."),)))
    assert [result.what for result in results if result.where == "stage 1"] == ["Another doctor is being answered."]


def test_a_model_that_does_not_fit_is_an_error_with_every_cure():
    finding = check_plan(
        Planned(refusal="The model needs 9 GB.", cures=("free 2 GB on pc", "NOODLE_DTYPE=float16")), "m"
    )
    assert finding.status == "error"
    assert "free 2 GB on pc" in finding.cure
    assert "NOODLE_DTYPE=float16" in finding.cure
    assert check_plan(Planned(reason="no answer"), "m").status == "skipped"


def test_a_report_shows_every_outcome_and_fails_only_by_errors():
    results = (
        ok("docker", "a", "engine 27"),
        warning("speed", "a", "slow", why="because", cure="a cable"),
        skipped("plan", "a", "not yet"),
    )
    report = Report(machine="a", role="single", system="linux", version="0.1.0", seconds=1.0, results=results)
    assert report.is_healthy
    broken = msgspec.structs.replace(report, results=(*results, error("reach", "b", "gone", why="w", cure="one\ntwo")))
    assert not broken.is_healthy
    text = text_of(broken)
    for shown in (
        "engine 27",
        "why:  because",
        "cure: a cable",
        "skipped  plan",
        "b: gone",
        "cure: one",
        "two",
        "1 error, 1 warning,",
    ):
        assert shown in text
    assert msgspec.json.decode(msgspec.json.encode(broken), type=Report) == broken


def test_work_that_does_not_end_is_not_waited_for():
    never = threading.Event()
    began = time.monotonic()
    job = Job("waiting", never.wait)
    with pytest.raises(RequestTimedOut, match="waiting took too long"):
        job.value(began + 0.05)
    assert time.monotonic() - began < 5
    never.set()


def test_what_work_raises_is_raised_where_it_is_waited_for():
    def fails():
        raise NoodleError("broken")

    with pytest.raises(NoodleError, match="broken"):
        Job("failing", fails).value(time.monotonic() + 10)


def test_tries_come_back_in_the_order_of_their_targets():
    results = try_all(TARGETS, lambda target: ConnectionResult(target.name, target.url, outcome="open"))
    assert [reached.name for reached in results] == ["coordinator", "stage 1"]
