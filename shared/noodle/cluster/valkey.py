"""Valkey (or Redis) as noodle uses it; the only file with keys in it. Never activations, never weights (design D14).

noodle:plan                     string, the newest Plan as JSON; written by the planner
noodle:plan:version             counter, the highest plan version ever given out
noodle:planner                  string, PlannerState, expires
noodle:stage:<id>:report        string, MachineReport, expires; written by the stage
noodle:stage:<id>:owner         string, URL of the stage that has this number, expires: a lease as the coordinator's
noodle:stage:<id>:state         string, StageState, expires: the stage's heartbeat
noodle:coordinator:leader       string, name of the coordinator that leads, expires: a lease by the server's clock
noodle:coordinator:epoch        counter, raised by each coordinator that takes the lead
noodle:request:<id>             string, the coordinator's Request as JSON, expires some time after its last change
noodle:request:<id>:tokens      list of tokens generated so far, expires with it
noodle:hop:<stage id>           stream, what that stage is to compute: token ids or references; bounded, expires
noodle:results                  stream, what the last stage made of it; bounded, expires
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import redis

from noodle.cluster.plan import MachineReport, Plan, PlannerState, StageState
from noodle.errors import QueueUnavailable

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 2.0
ANSWER_TIMEOUT_SECONDS = 3.0
BEAT_EXPIRES_SECONDS = 4  # three missed beats of one second, and one for the way
LEASE_SECONDS = 5
RECORD_EXPIRES_SECONDS = 600
STREAM_ENTRIES = 256  # of one stream; many times the steps that are in flight
STREAM_EXPIRES_SECONDS = 600  # after its last entry
STREAM_READ_ENTRIES = 16
STREAM_BEGIN = "0-0"  # before every entry
RESULTS_STREAM = "noodle:results"

# Renew only what is still ours, in one step on the server.
RENEW_LEASE = (
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end return 0"
)
END_LEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"

# Take a stage's number unless another one has it, in one step; gives the one that has it now.
CLAIM_STAGE = (
    "local owner = redis.call('get', KEYS[1]) if owner and owner ~= ARGV[1] then return owner end "
    "redis.call('set', KEYS[1], ARGV[1], 'ex', ARGV[2]) return ARGV[1]"
)

Value = TypeVar("Value", bound=msgspec.Struct)


class NotOurs(QueueUnavailable):
    """Raised for an entry that can not be decoded."""


def hop_stream(stage_id: int) -> str:
    """Where a stage reads what it is to compute."""
    return f"noodle:hop:{stage_id}"


def _state_key(stage_id: int | str) -> str:
    return f"noodle:stage:{stage_id}:state"


def _by_stage(states: Iterable[StageState]) -> dict[int, StageState]:
    return {state.stage_id: state for state in states}


class WorkQueue:
    """One client of Valkey; every method raises QueueUnavailable when it does not answer in time."""

    def __init__(self, url: str, password: str, answer_timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> None:
        self._url = url
        self._redis = redis.Redis.from_url(
            url,
            password=password or None,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            socket_timeout=answer_timeout_seconds,
            retry=None,  # waiting and trying again is the caller's, who knows what hangs on it
        )

    def server_id(self) -> str:
        """Names the running server: another one after a restart, which may have lost its last second."""
        with self._told():
            return str(self._redis.info("server")["run_id"])

    # plans and machines

    def next_plan_version(self) -> int:
        """A version higher than any before."""
        with self._told():
            return int(self._redis.incr("noodle:plan:version"))

    def put_plan(self, plan: Plan) -> None:
        """Make this the newest plan."""
        with self._told():
            self._redis.set("noodle:plan", msgspec.json.encode(plan))

    def plan(self) -> Plan | None:
        """The newest plan."""
        return self._get("noodle:plan", Plan)

    def put_planner_state(self, state: PlannerState) -> None:
        """Say what the planner does."""
        with self._told():
            self._redis.set("noodle:planner", msgspec.json.encode(state), ex=BEAT_EXPIRES_SECONDS)

    def claim_stage(self, stage_id: int, url: str) -> str:
        """Say with each beat that the stage at this URL has this number; gives the URL of the one that really has it.

        A stage that starts again has the same URL, and takes its number up at once.
        """
        with self._told():
            key = f"noodle:stage:{stage_id}:owner"
            owner = self._redis.eval(CLAIM_STAGE, 1, key, url, str(BEAT_EXPIRES_SECONDS))
            return owner.decode() if isinstance(owner, bytes) else url

    def put_report(self, report: MachineReport) -> None:
        """Say what this stage's machine can do; gone when the stage falls silent."""
        with self._told():
            key = f"noodle:stage:{report.stage_id}:report"
            self._redis.set(key, msgspec.json.encode(report), ex=BEAT_EXPIRES_SECONDS)

    def reports(self) -> list[MachineReport]:
        """The reports of all stages that beat, by stage id."""
        return sorted(self._all("noodle:stage:*:report", MachineReport), key=lambda report: report.stage_id)

    def put_stage_state(self, state: StageState) -> None:
        """One beat of a stage's heart."""
        with self._told():
            self._redis.set(_state_key(state.stage_id), msgspec.json.encode(state), ex=BEAT_EXPIRES_SECONDS)

    def stage_states(self) -> dict[int, StageState]:
        """The states of all stages that beat."""
        return _by_stage(self._all(_state_key("*"), StageState))

    def look(self, stage_ids: Collection[int]) -> tuple[PlannerState | None, Plan | None, dict[int, StageState]]:
        """What the planner does, the newest plan and the states of these stages that beat, in one trip.

        A planner that has been silent, and a plan that there is not yet, are None.
        """
        keys = ["noodle:planner", "noodle:plan", *map(_state_key, stage_ids)]
        with self._told():
            planner, plan, *states = self._redis.mget(keys)
        return (
            self._decoded(keys[0], planner, PlannerState),
            self._decoded(keys[1], plan, Plan),
            _by_stage(self._all_decoded(keys[2:], states, StageState)),
        )

    def states_of(self, stage_ids: Sequence[int]) -> dict[int, StageState]:
        """The states of these stages, without those that do not beat, in one trip."""
        keys = list(map(_state_key, stage_ids))
        with self._told():
            values = self._redis.mget(keys)
        return _by_stage(self._all_decoded(keys, values, StageState))

    def forget_stage(self, stage_id: int, url: str) -> None:
        """Take away what the stage at this URL said of itself: it says goodbye, and its number is free."""
        with self._told():
            if self._redis.eval(END_LEASE, 1, f"noodle:stage:{stage_id}:owner", url):
                self._redis.delete(f"noodle:stage:{stage_id}:report", _state_key(stage_id))

    # who leads

    def take_lease(self, name: str) -> int | None:
        """Become the leading coordinator: the new epoch, or None when another one leads."""
        with self._told():
            if not self._redis.set("noodle:coordinator:leader", name, nx=True, px=LEASE_SECONDS * 1000):
                return None
            return int(self._redis.incr("noodle:coordinator:epoch"))

    def renew_lease(self, name: str) -> bool:
        """Lead on; False when the lease is no longer ours."""
        with self._told():
            return bool(self._redis.eval(RENEW_LEASE, 1, "noodle:coordinator:leader", name, str(LEASE_SECONDS * 1000)))

    def end_lease(self, name: str) -> None:
        """Stop leading, so that another can at once."""
        with self._told():
            self._redis.eval(END_LEASE, 1, "noodle:coordinator:leader", name)

    def leader(self) -> str | None:
        """The name of the coordinator that leads."""
        with self._told():
            name = self._redis.get("noodle:coordinator:leader")
            return name.decode() if isinstance(name, bytes) else None

    # requests in progress

    def record_request(self, request_id: str, record: bytes, tokens: Sequence[bytes] = ()) -> None:
        """Keep a request's record and tokens, as its coordinator encodes them. Replaces what was kept of it before."""
        key = f"noodle:request:{request_id}"
        with self._told():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.set(key, record, ex=RECORD_EXPIRES_SECONDS)
            pipeline.delete(f"{key}:tokens")
            if tokens:
                pipeline.rpush(f"{key}:tokens", *tokens)
                pipeline.expire(f"{key}:tokens", RECORD_EXPIRES_SECONDS)
            pipeline.execute()

    def record_tokens(self, batches: Mapping[str, Sequence[bytes]]) -> None:
        """Append generated tokens to their requests, in one trip."""
        with self._told():
            pipeline = self._redis.pipeline(transaction=False)
            for request_id, tokens in batches.items():
                key = f"noodle:request:{request_id}"
                pipeline.rpush(f"{key}:tokens", *tokens)
                pipeline.expire(f"{key}:tokens", RECORD_EXPIRES_SECONDS)
                pipeline.expire(key, RECORD_EXPIRES_SECONDS)
            pipeline.execute()

    def forget_request(self, request_id: str) -> None:
        """Delete the record of a request that has ended."""
        with self._told():
            self._redis.delete(f"noodle:request:{request_id}", f"noodle:request:{request_id}:tokens")

    def recorded_request(self, request_id: str) -> tuple[bytes, list[bytes]] | None:
        """Return the record and tokens of a request, in progress or ended."""
        with self._told():
            record: Any = self._redis.get(f"noodle:request:{request_id}")
            tokens: Any = self._redis.lrange(f"noodle:request:{request_id}:tokens", 0, -1)
        return None if record is None else (record, tokens)

    def recorded_requests(self) -> dict[str, tuple[bytes, list[bytes]]]:
        """Return all requests that are kept, for a coordinator that takes the lead."""
        with self._told():
            keys = [key.decode() for key in self._redis.scan_iter(match="noodle:request:*", count=1000)]
        names = sorted(key.removeprefix("noodle:request:") for key in keys if not key.endswith(":tokens"))
        return {name: found for name in names if (found := self.recorded_request(name)) is not None}

    # the queued way of a hop

    def append(self, stream: str, entry: bytes) -> None:
        """Add one entry at the end of a stream, whose oldest go when it is full."""
        with self._told():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.xadd(stream, {"m": entry}, maxlen=STREAM_ENTRIES, approximate=False)
            pipeline.expire(stream, STREAM_EXPIRES_SECONDS)
            pipeline.execute()

    def newest(self, stream: str) -> str:
        """The id of a stream's last entry, or what stands before all entries when there is none."""
        with self._told():
            entries: Any = self._redis.xrevrange(stream, count=1)
            return str(entries[0][0].decode()) if entries else STREAM_BEGIN

    def read(self, stream: str, after: str, block_seconds: float) -> list[tuple[str, bytes]]:
        """The next entries after an id, each with its own; empty when none comes in time."""
        with self._told():
            answer: Any = self._redis.xread({stream: after}, count=STREAM_READ_ENTRIES, block=int(block_seconds * 1000))
            entries = [entry for _, found in answer or () for entry in found]
            return [(name.decode(), fields.get(b"m", b"")) for name, fields in entries]

    def _get(self, key: str, kind: type[Value]) -> Value | None:
        with self._told():
            data = self._redis.get(key)
        return self._decoded(key, data, kind)

    def _all(self, pattern: str, kind: type[Value]) -> list[Value]:
        with self._told():
            keys = list(self._redis.scan_iter(match=pattern, count=1000))
            values = self._redis.mget(keys) if keys else []
        return self._all_decoded(keys, values, kind)

    def _all_decoded(self, keys: Sequence[object], values: Sequence[object], kind: type[Value]) -> list[Value]:
        """Without those that are not there."""
        decoded = (self._decoded(str(key), value, kind) for key, value in zip(keys, values, strict=True))
        return [value for value in decoded if value is not None]

    def _decoded(self, key: str, data: object, kind: type[Value]) -> Value | None:
        if not isinstance(data, bytes):
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise NotOurs(
                f"Valkey holds something under {key} that is not ours: {error}",
                cure="Run the same noodle version on every machine, or empty Valkey.",
            ) from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise QueueUnavailable(
                f"Valkey at {self._url} refuses the password.", cure="Check NOODLE_VALKEY_PASSWORD."
            ) from error
        except redis.OutOfMemoryError as error:
            raise QueueUnavailable(
                f"Valkey at {self._url} is full: it takes nothing more under its maxmemory.",
                cure="Give it more memory (maxmemory), or delete what fills it.",
                retry_after_seconds=2,
            ) from error
        except redis.RedisError as error:
            raise QueueUnavailable(f"Valkey at {self._url} does not answer: {error}.", retry_after_seconds=2) from error
