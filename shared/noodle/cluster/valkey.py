"""The work queue in Valkey (or Redis), and every key that noodle uses there; no activations, no weights (design D14).

noodle:plan                     string, the newest Plan as JSON; written by the planner
noodle:plan:version             counter, the highest plan version so far
noodle:planner                  string, PlannerState, expires
noodle:stage:<id>:report        string, MachineReport, expires; written by the stage
noodle:stage:<id>:owner         string, URL of the stage with this number, expires: a lease
noodle:stage:<id>:state         string, StageState, expires: the stage's heartbeat
noodle:coordinator:leader       string, name of the leading coordinator, expires: a lease by the server's clock
noodle:coordinator:epoch        counter, raised by each coordinator that starts to lead
noodle:request:<id>             string, the coordinator's Request as JSON, expires some time after its last change
noodle:request:<id>:tokens      list of tokens generated so far, expires with it
noodle:hop:<stage id>           stream, steps for that stage: token ids or references; bounded, expires
noodle:results                  stream, results of the last stage; bounded, expires
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

CONNECT_TIMEOUT_SECONDS = 2.0  # longest wait for a connection to Valkey
ANSWER_TIMEOUT_SECONDS = 3.0  # longest wait for an answer of Valkey
BEAT_EXPIRES_SECONDS = 4  # lifetime of a heartbeat: three missed beats of one second, and one for the network
LEASE_SECONDS = 5  # lifetime of the lease of the leading coordinator
RECORD_EXPIRES_SECONDS = 600  # lifetime of a request's record after its last change
STREAM_ENTRIES = 256  # most entries of a stream; many times the steps in flight
STREAM_EXPIRES_SECONDS = 600  # lifetime of a stream after its last entry
STREAM_READ_ENTRIES = 16  # most entries of one read
STREAM_BEGIN = "0-0"  # before every entry
RESULTS_STREAM = "noodle:results"

# Renew or end a lease only while it is ours, in one step on the server.
RENEW_LEASE = (
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end return 0"
)
END_LEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"

# Claim a stage's number unless another stage has it, in one step; returns the owner.
CLAIM_STAGE = (
    "local owner = redis.call('get', KEYS[1]) if owner and owner ~= ARGV[1] then return owner end "
    "redis.call('set', KEYS[1], ARGV[1], 'ex', ARGV[2]) return ARGV[1]"
)

Value = TypeVar("Value", bound=msgspec.Struct)


def hop_stream(stage_id: int) -> str:
    return f"noodle:hop:{stage_id}"


def _state_key(stage_id: int | str) -> str:
    return f"noodle:stage:{stage_id}:state"


def _by_stage(states: Iterable[StageState]) -> dict[int, StageState]:
    return {state.stage_id: state for state in states}


class WorkQueue:
    """One client of Valkey; every method raises QueueUnavailable when it does not answer in time."""

    def __init__(self, url: str, password: str, answer_timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> None:
        self._url = url
        self._unreadable_keys: set[str] = set()  # already logged
        self._redis = redis.Redis.from_url(
            url,
            password=password or None,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            socket_timeout=answer_timeout_seconds,
            retry=None,  # the caller decides whether to retry
        )

    def server_id(self) -> str:
        """Id of the running server; a new one after a restart, which may lose the last second."""
        with self._errors():
            return str(self._redis.info("server")["run_id"])

    # plans and machines

    def next_plan_version(self) -> int:
        """Return a version higher than any before."""
        with self._errors():
            return int(self._redis.incr("noodle:plan:version"))

    def put_plan(self, plan: Plan) -> None:
        self._put("noodle:plan", plan)

    def plan(self) -> Plan | None:
        with self._errors():
            data = self._redis.get("noodle:plan")
        return self._decode("noodle:plan", data, Plan)

    def put_planner_state(self, state: PlannerState) -> None:
        self._put("noodle:planner", state, BEAT_EXPIRES_SECONDS)

    def claim_stage(self, stage_id: int, url: str) -> str:
        """Claim a number for the stage at this URL, with each heartbeat; return the URL of its owner.

        A restarted stage has the same URL and gets its number back at once.
        """
        with self._errors():
            key = f"noodle:stage:{stage_id}:owner"
            owner = self._redis.eval(CLAIM_STAGE, 1, key, url, str(BEAT_EXPIRES_SECONDS))
            return owner.decode() if isinstance(owner, bytes) else url

    def put_report(self, report: MachineReport) -> None:
        """Store a stage's report; it expires when the stage falls silent."""
        self._put(f"noodle:stage:{report.stage_id}:report", report, BEAT_EXPIRES_SECONDS)

    def reports(self) -> list[MachineReport]:
        """Return the reports of all live stages, by stage id."""
        return sorted(self._all("noodle:stage:*:report", MachineReport), key=lambda report: report.stage_id)

    def put_stage_state(self, state: StageState) -> None:
        self._put(_state_key(state.stage_id), state, BEAT_EXPIRES_SECONDS)

    def stage_states(self) -> dict[int, StageState]:
        return _by_stage(self._all(_state_key("*"), StageState))

    def look(self, stage_ids: Collection[int]) -> tuple[PlannerState | None, Plan | None, dict[int, StageState]]:
        """Return the planner's state, the newest plan and the states of these stages, in one round trip.

        A silent planner and a missing plan are None; silent stages are left out.
        """
        keys = ["noodle:planner", "noodle:plan", *map(_state_key, stage_ids)]
        with self._errors():
            planner, plan, *states = self._redis.mget(keys)
        return (
            self._decode(keys[0], planner, PlannerState),
            self._decode(keys[1], plan, Plan),
            _by_stage(self._decode_all(keys[2:], states, StageState)),
        )

    def states_of(self, stage_ids: Sequence[int]) -> dict[int, StageState]:
        """Return the states of these stages that are live, in one round trip."""
        return _by_stage(self._many(list(map(_state_key, stage_ids)), StageState))

    def forget_stage(self, stage_id: int, url: str) -> None:
        """Delete the records of the stage at this URL when it leaves, and free its number."""
        with self._errors():
            if self._redis.eval(END_LEASE, 1, f"noodle:stage:{stage_id}:owner", url):
                self._redis.delete(f"noodle:stage:{stage_id}:report", _state_key(stage_id))

    # the leading coordinator

    def take_lease(self, name: str) -> int | None:
        """Take the lease of the leading coordinator; return the new epoch, None when another one leads."""
        with self._errors():
            if not self._redis.set("noodle:coordinator:leader", name, nx=True, px=LEASE_SECONDS * 1000):
                return None
            return int(self._redis.incr("noodle:coordinator:epoch"))

    def renew_lease(self, name: str) -> bool:
        """Renew our lease; False when it is no longer ours."""
        with self._errors():
            return bool(self._redis.eval(RENEW_LEASE, 1, "noodle:coordinator:leader", name, str(LEASE_SECONDS * 1000)))

    def end_lease(self, name: str) -> None:
        """Give up our lease, so that another coordinator can lead at once."""
        with self._errors():
            self._redis.eval(END_LEASE, 1, "noodle:coordinator:leader", name)

    def leader(self) -> str | None:
        with self._errors():
            name = self._redis.get("noodle:coordinator:leader")
            return name.decode() if isinstance(name, bytes) else None

    # requests in progress

    def record_request(self, request_id: str, record: bytes, tokens: Sequence[bytes] = ()) -> None:
        """Keep a request's record and tokens, as its coordinator encodes them. Replaces what was kept of it before."""
        key = f"noodle:request:{request_id}"
        with self._errors():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.set(key, record, ex=RECORD_EXPIRES_SECONDS)
            pipeline.delete(f"{key}:tokens")
            if tokens:
                pipeline.rpush(f"{key}:tokens", *tokens)
                pipeline.expire(f"{key}:tokens", RECORD_EXPIRES_SECONDS)
            pipeline.execute()

    def record_tokens(self, batches: Mapping[str, Sequence[bytes]]) -> None:
        """Append generated tokens to their requests, in one trip."""
        with self._errors():
            pipeline = self._redis.pipeline(transaction=False)
            for request_id, tokens in batches.items():
                key = f"noodle:request:{request_id}"
                pipeline.rpush(f"{key}:tokens", *tokens)
                pipeline.expire(f"{key}:tokens", RECORD_EXPIRES_SECONDS)
                pipeline.expire(key, RECORD_EXPIRES_SECONDS)
            pipeline.execute()

    def forget_request(self, request_id: str) -> None:
        with self._errors():
            self._redis.delete(f"noodle:request:{request_id}", f"noodle:request:{request_id}:tokens")

    def recorded_request(self, request_id: str) -> tuple[bytes, list[bytes]] | None:
        """Return the record and tokens of a request, in progress or ended."""
        with self._errors():
            record: Any = self._redis.get(f"noodle:request:{request_id}")
            tokens: Any = self._redis.lrange(f"noodle:request:{request_id}:tokens", 0, -1)
        return None if record is None else (record, tokens)

    def recorded_requests(self) -> dict[str, tuple[bytes, list[bytes]]]:
        """Return all requests that are kept, for a coordinator that takes the lead."""
        with self._errors():
            keys = [key.decode() for key in self._redis.scan_iter(match="noodle:request:*", count=1000)]
        names = sorted(key.removeprefix("noodle:request:") for key in keys if not key.endswith(":tokens"))
        return {name: found for name in names if (found := self.recorded_request(name)) is not None}

    # streams of hops

    def append(self, stream: str, entry: bytes) -> None:
        """Append one entry to a stream; a full stream drops its oldest."""
        with self._errors():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.xadd(stream, {"m": entry}, maxlen=STREAM_ENTRIES, approximate=False)
            pipeline.expire(stream, STREAM_EXPIRES_SECONDS)
            pipeline.execute()

    def newest(self, stream: str) -> str:
        """Return the id of a stream's last entry, STREAM_BEGIN when it is empty."""
        with self._errors():
            entries: Any = self._redis.xrevrange(stream, count=1)
            return str(entries[0][0].decode()) if entries else STREAM_BEGIN

    def read(self, stream: str, after: str, block_seconds: float) -> list[tuple[str, bytes]]:
        """Return the entries after an id, each with its id; empty when none arrives in time."""
        with self._errors():
            answer: Any = self._redis.xread({stream: after}, count=STREAM_READ_ENTRIES, block=int(block_seconds * 1000))
            entries = [entry for _, found in answer or () for entry in found]
            return [(name.decode(), fields.get(b"m", b"")) for name, fields in entries]

    def _put(self, key: str, value: msgspec.Struct, expires_seconds: int | None = None) -> None:
        with self._errors():
            self._redis.set(key, msgspec.json.encode(value), ex=expires_seconds)

    def _many(self, keys: Sequence[str], kind: type[Value]) -> list[Value]:
        with self._errors():
            values = self._redis.mget(keys) if keys else []
        return self._decode_all(keys, values, kind)

    def _all(self, pattern: str, kind: type[Value]) -> list[Value]:
        with self._errors():
            keys = [key.decode() for key in self._redis.scan_iter(match=pattern, count=1000)]
        return self._many(keys, kind)

    def _decode_all(self, keys: Sequence[str], values: Sequence[object], kind: type[Value]) -> list[Value]:
        """Decode the values that exist and are readable."""
        decoded = (self._decode(key, value, kind) for key, value in zip(keys, values, strict=True))
        return [value for value in decoded if value is not None]

    def _decode(self, key: str, data: object, kind: type[Value]) -> Value | None:
        """Decode a record; one of another version counts as missing, with one log line for each key."""
        if not isinstance(data, bytes):
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            if key not in self._unreadable_keys:
                self._unreadable_keys.add(key)
                log.warning(
                    "ignoring %s in Valkey, which this version cannot read: %s. "
                    "Run the same noodle version on every machine.",
                    key,
                    error,
                )
            return None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise QueueUnavailable(
                f"Valkey at {self._url} rejects the password.", cure="Check NOODLE_VALKEY_PASSWORD."
            ) from error
        except redis.OutOfMemoryError as error:
            raise QueueUnavailable(
                f"Valkey at {self._url} is full: its maxmemory is reached.",
                cure="Raise its maxmemory, or delete what fills it.",
                retry_after_seconds=2,
            ) from error
        except redis.RedisError as error:
            raise QueueUnavailable(f"Valkey at {self._url} does not answer: {error}.", retry_after_seconds=2) from error
