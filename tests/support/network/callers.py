"""The coordinator's two ends of a pipeline, operated by a test, over connections or streams."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from noodle.cluster.valkey import RESULTS_STREAM, hop_stream
from noodle.errors import LinkLost
from noodle.wire.frames import encode_entry
from noodle.wire.hop_client import HopConnection, ResultsConnection
from noodle.wire.messages import InlineStep, KeepAlive, SamplingParameters, Step, StepResult, StepSpan
from noodle.wire.queue_end import QueueEnd
from tests.support.processes.cluster import wait_until

TOKENS = (3).to_bytes(4, "little") * 4


class Caller:
    """What all callers share."""

    epochs = itertools.count(1)

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.epoch = next(self.epochs)  # a newer epoch each time, so that all sessions start over
        self.heard: list[Any] = []
        self.lost = threading.Event()

    def send_message(self, message: Any, body: bytes = b"") -> None:
        """Send any message to stage 0."""
        raise NotImplementedError

    def step(
        self,
        body=TOKENS,
        *,
        first=0,
        count=None,
        session="session",
        session_epoch=1,
        logprob=False,
        reserve=100,
        **changes,
    ):
        """Return a step of one span."""
        count = len(body) // 4 if count is None else count
        span = StepSpan(session, session_epoch, first, count, reserve, SamplingParameters(), logprob)
        fields = {"step_id": 1, "plan_version": self.rig.plan.version, "coordinator_epoch": self.epoch,
                  "dtype": "int32", "shape": [count], "spans": [span], "gap_seconds": 0.5}  # fmt: skip
        return Step(**{**fields, **changes})

    def send(self, body, **changes):
        """Send a step of one span."""
        self.send_message(self.step(body, **changes), body)

    def result(self, number=1):
        """Return the result at this position."""

        def look():
            results = [message for message in self.heard if isinstance(message, StepResult)]
            mine = [result for result in results if result.coordinator_epoch == self.epoch]
            return mine[number - 1] if len(mine) >= number else None

        return wait_until(look, 15, f"result {number}")


class DirectCaller(Caller):
    """Uses POST /hop and GET /results."""

    def __enter__(self):
        token, version = self.rig.token, self.rig.plan.version
        self.results = ResultsConnection(self.rig.urls[-1], token, self.heard.append, lambda reason: None)
        wait_until(lambda: self.opens(lambda: self.results.open(version, self.epoch)), 10, "the results open")
        self.round_trips: list[float] = []
        self.hop = HopConnection(
            self.rig.urls[0], token, self.heard.append, lambda reason: self.lost.set(), self.round_trips.append
        )
        wait_until(lambda: self.opens(lambda: self.hop.open(version)), 10, "the hop opens")
        wait_until(self.chain_is_whole, 15, "both stages say that they are connected")
        return self

    def __exit__(self, *_):
        self.hop.close()
        self.results.close()

    @staticmethod
    def opens(open_it):
        try:
            open_it()
        except LinkLost:
            return False
        return True

    def chain_is_whole(self):
        chains = [message.chain for message in self.heard if isinstance(message, KeepAlive) and message.chain]
        return bool(chains) and len(chains[-1]) == 2 and all(link.next_link_up for link in chains[-1])

    def send_message(self, message, body=b""):
        self.hop.send(message, body)


class QueueCaller(Caller):
    """Uses the streams of stage 0 and of the results; `rig.work_queue` is Valkey or streams in memory."""

    def __enter__(self):
        self.end = QueueEnd(
            self.rig.work_queue, RESULTS_STREAM, take=self.heard.append, changed=lambda: None, refused=self.heard.append
        )
        self.end.start("test")
        wait_until(lambda: not self.end.failure, 10, "the results are read")
        wait_until(self.all_are_linked, 15, "both stages say that they can send")
        return self

    def __exit__(self, *_):
        self.end.close()

    def all_are_linked(self):
        links = [state["link"] for state in self.rig.states()]
        return all(link and link["next_link_up"] for link in links)

    def send_message(self, message, body=b""):
        entry = InlineStep(message, body) if isinstance(message, Step) else message
        self.rig.work_queue.append(hop_stream(0), encode_entry(entry))


class LastStageCaller(DirectCaller):
    """Uses connections to the last stage alone."""

    def __enter__(self):
        token, version, url = self.rig.token, self.rig.plan.version, self.rig.urls[-1]
        self.results = ResultsConnection(url, token, self.heard.append, lambda reason: None)
        self.results.open(version, self.epoch)
        self.hop = HopConnection(url, token, self.heard.append, lambda reason: self.lost.set())
        self.hop.open(version)
        return self
