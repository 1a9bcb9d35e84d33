"""A real Valkey with the ACL file of `noodle init`: every work queue command passes, and nothing else."""

import inspect
import subprocess

import pytest
import redis

from noodle.cluster.plan import MachineReport, Plan, PlannerState, StageState
from noodle.cluster.valkey import WorkQueue
from noodle.cluster.valkey_access import USER, acl_text
from noodle.errors import QueueUnavailable
from services.cli.local.valkey import server_binary
from tests.support.processes.cluster import free_ports, wait_until

PASSWORD = "the password of the cluster"
URL_0, URL_1 = "http://127.0.0.1:8081", "http://127.0.0.1:8082"
REPORT = MachineReport(0, "vm", URL_0, "boot", "0.1.0", "digest", "cpu", "cpu", "float32", 1, 1, 0.1, 0.1, 0.1)
RECORD = b'{"request_id": "id"}'
# every method, in an order that gives each something to do
TOKENS = [b"[4]", b"[5]", b"[6]"]
CALLS = {
    "server_id": lambda work: work.server_id(),
    "next_plan_version": lambda work: work.next_plan_version() == 1,
    "put_plan": lambda work: work.put_plan(Plan(1, "digest", 1, 1, 1, 1, ())) is None,
    "plan": lambda work: work.plan().version == 1,
    "put_planner_state": lambda work: work.put_planner_state(PlannerState("waiting")) is None,
    "claim_stage": lambda work: work.claim_stage(0, URL_0) == URL_0,
    "put_report": lambda work: work.put_report(REPORT) is None,
    "reports": lambda work: work.reports() == [REPORT],
    "put_stage_state": lambda work: work.put_stage_state(StageState(0, "vm", "boot", "ready")) is None,
    "stage_states": lambda work: set(work.stage_states()) == {0},
    "look": lambda work: (
        (work.look([0, 1])[0].phase, work.look([0, 1])[1].version, set(work.look([0, 1])[2])) == ("waiting", 1, {0})
    ),
    "states_of": lambda work: set(work.states_of([0, 1])) == {0},
    "forget_stage": lambda work: work.forget_stage(0, URL_0) is None and work.stage_states() == {},
    "take_lease": lambda work: work.take_lease("me") == 1,
    "renew_lease": lambda work: work.renew_lease("me"),
    "leader": lambda work: work.leader() == "me",
    "end_lease": lambda work: work.end_lease("me") is None and work.leader() is None,
    "record_request": lambda work: work.record_request("id", RECORD, TOKENS[:1]) is None,
    "record_tokens": lambda work: work.record_tokens({"id": TOKENS[1:]}) is None,
    "recorded_request": lambda work: work.recorded_request("id") == (RECORD, TOKENS),
    "recorded_requests": lambda work: work.recorded_requests() == {"id": (RECORD, TOKENS)},
    "forget_request": lambda work: work.forget_request("id") is None and work.recorded_request("id") is None,
    "append": lambda work: work.append("noodle:results", b"entry") is None,
    "newest": lambda work: work.newest("noodle:results") != "0-0",
    "read": lambda work: [entry for _, entry in work.read("noodle:results", "0-0", 0.1)] == [b"entry"],
}


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valkey")
    (folder / "valkey.acl").write_text(acl_text(PASSWORD), encoding="utf-8")
    (port,) = free_ports(1)
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--aclfile", "valkey.acl", "--appendonly", "yes"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server_binary(), *arguments], cwd=folder, stdout=log)
    try:
        with redis.Redis(port=port, username=USER, password=PASSWORD) as client:

            def answers():
                try:
                    return client.ping()
                except redis.RedisError:
                    return False

            wait_until(answers, 10, "Valkey answers")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def test_all_of_the_work_queue_passes(port):
    work = WorkQueue(f"redis://{USER}@127.0.0.1:{port}", PASSWORD)
    public = {name for name, _ in inspect.getmembers(WorkQueue, inspect.isfunction) if not name.startswith("_")}
    assert set(CALLS) == public
    for name, call in CALLS.items():
        assert call(work), name


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "other:key"), ("SET", "other:key", "1"), ("KEYS", "*"), ("FLUSHALL",), ("CONFIG", "GET", "dir"),
        ("ACL", "LIST"), ("SHUTDOWN",), ("MONITOR",), ("PUBLISH", "noodle:x", "1"),
        ("EVAL", "return redis.call('get', KEYS[1])", "1", "other:key"), ("MODULE", "LIST"), ("SAVE",),
        ("REPLICAOF", "127.0.0.1", "1"), ("CLIENT", "KILL", "TYPE", "normal"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_what_noodle_does_not_need_is_refused(port, command):
    with (
        redis.Redis(port=port, username=USER, password=PASSWORD) as client,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*command)


@pytest.mark.parametrize("who", [{}, {"password": "guess"}, {"username": USER, "password": "guess"}])
def test_nobody_else_is_let_in(port, who):
    with redis.Redis(port=port, **who) as client, pytest.raises(redis.AuthenticationError):
        client.get("noodle:plan")


def test_a_wrong_password_is_said_with_its_cure(port):
    with pytest.raises(QueueUnavailable, match="rejects the password") as refused:
        WorkQueue(f"redis://{USER}@127.0.0.1:{port}", "guess").plan()
    assert "NOODLE_VALKEY_PASSWORD" in refused.value.cure


def test_a_number_belongs_to_the_stage_that_has_it_until_that_is_silent_or_gone(port):
    work = WorkQueue(f"redis://{USER}@127.0.0.1:{port}", PASSWORD)
    assert work.claim_stage(7, URL_0) == URL_0
    assert work.claim_stage(7, URL_1) == URL_0
    assert work.claim_stage(7, URL_0) == URL_0
    work.forget_stage(7, URL_1)  # not its own
    assert work.claim_stage(7, URL_1) == URL_0
    work.forget_stage(7, URL_0)
    assert work.claim_stage(7, URL_1) == URL_1


def test_records_that_another_version_left_are_ignored_with_one_line_each(port, caplog):
    work = WorkQueue(f"redis://{USER}@127.0.0.1:{port}", PASSWORD)
    state, plan = StageState(1, "vm", "boot", "ready"), Plan(2, "digest", 1, 1, 1, 1, ())
    keys = ("noodle:plan", "noodle:planner", "noodle:stage:0:report", "noodle:stage:0:state")
    with redis.Redis(port=port, username=USER, password=PASSWORD) as client:
        for key, junk in zip(keys, (b'{"version": "one"}', b"[]", b'{"stage": 0}', b"\xff"), strict=True):
            client.set(key, junk)
    work.put_stage_state(state)
    for _ in range(3):
        assert work.plan() is None
        assert work.reports() == []
        assert work.stage_states() == work.states_of([0, 1]) == {1: state}
        assert work.look([0, 1]) == (None, None, {1: state})
    ignored = [record.getMessage() for record in caplog.records if record.getMessage().startswith("ignoring")]
    assert sorted(message.split()[1] for message in ignored) == sorted(keys)
    work.put_plan(plan)
    assert work.plan() == plan
