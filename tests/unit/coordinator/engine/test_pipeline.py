"""When a pipeline is up by the stages' heartbeats, which events it repeats, and what its errors name."""

import time

import pytest
from prometheus_client import CollectorRegistry

from noodle.cluster.plan import Plan, StageAssignment, StageState
from noodle.cluster.valkey import RESULTS_STREAM, hop_stream
from noodle.errors import LinkLost
from noodle.metrics.counted import TravelMetrics
from noodle.wire.frames import decode_entry, encode_entry
from noodle.wire.messages import ChainLink, LiveSessions, SpanResult, StepResult, TokenLogprob, TokenScore
from services.coordinator.engine.pipeline import Pipeline, PipelineDown, PipelineUp
from tests.support.network.memory_streams import MemoryStreams
from tests.support.processes.cluster import free_ports, wait_until

SECONDS = 5
VERSION = 4


class BeatingStreams(MemoryStreams):
    """Streams, and the heartbeats of two stages."""

    def __init__(self):
        super().__init__()
        self.states = {}

    def beat(self, stage_id, *, boot="boot", version=VERSION, up=True, losses=0, transport="queue", detail=""):
        link = ChainLink(stage_id, f"{boot} {stage_id}", version, up, detail, True, losses)
        self.states = self.states | {
            stage_id: StageState(
                stage_id, "vm", link.boot_id, "ready", ready_version=version, transport=transport, link=link
            )
        }

    def states_of(self, stage_ids):
        self._answer()
        return {name: state for name, state in self.states.items() if name in stage_ids}


@pytest.fixture
def streams():
    made = BeatingStreams()
    made.beat(0)
    made.beat(1)
    return made


@pytest.fixture(params=["queue", "auto"])
def told(request, streams):
    """The events of a pipeline whose stages accept no connections."""
    ports = free_ports(2)
    stages = tuple(
        StageAssignment(index, "vm", f"http://127.0.0.1:{port}", index, index + 1, "float32")
        for index, port in enumerate(ports)
    )
    plan = Plan(VERSION, "digest", 2, 64, 300, 256, stages)
    events = []
    pipeline = Pipeline(
        plan, 1, "token", events.append,
        transport=request.param, work_queue=streams, travel=TravelMetrics(CollectorRegistry()),
    )  # fmt: skip
    events_of = Told(pipeline, events)
    yield events_of
    pipeline.close()


class Told:
    def __init__(self, pipeline, events):
        self.pipeline, self.events = pipeline, events

    def next(self, count):
        wait_until(lambda: len(self.events) >= count, SECONDS, f"{count} events")
        return self.events[count - 1]


BOOT_IDS = ("boot 0", "boot 1")


def test_it_is_up_when_every_stage_has_heartbeats_and_is_ready(told):
    assert told.next(1) == PipelineUp(VERSION, BOOT_IDS)


@pytest.mark.parametrize(
    ("beat", "said"),
    [
        ({"version": 3}, "stage 1"),
        ({"up": False, "detail": "Valkey is full"}, "Valkey is full"),
        (None, "stage 1 on vm is not connected"),
    ],
)
def test_a_stage_that_is_silent_or_not_ready_or_cut_off_breaks_it(told, streams, beat, said):
    told.next(1)
    if beat is None:
        streams.states = {0: streams.states[0]}
    else:
        streams.beat(1, **beat)
    down = told.next(2)
    assert isinstance(down, PipelineDown)
    assert said in down.reason
    streams.beat(1, boot="new boot")
    assert told.next(3) == PipelineUp(VERSION, ("boot 0", "new boot 1"))


def test_a_lost_connection_between_two_stages_sends_one_more_event_with_the_same_boot_ids(told, streams):
    told.next(1)
    streams.beat(0, losses=1)
    assert told.next(2) == PipelineUp(VERSION, BOOT_IDS)
    streams.beat(0, losses=0)  # a heartbeat that is older than the known state
    streams.beat(0, losses=1)
    time.sleep(0.6)  # two looks, without an event
    assert len(told.events) == 2


def test_steps_go_to_the_stream_of_stage_0_and_results_come_from_the_results_stream(told, streams):
    told.next(1)
    live = LiveSessions(VERSION, 1, ["a"])
    told.pipeline.send(live)
    (entry,) = streams.read(hop_stream(0), "0-0", 1)
    assert decode_entry(entry[1]) == live
    result = StepResult(1, VERSION, 1, [], [], [])
    streams.append(RESULTS_STREAM, encode_entry(result))
    assert told.next(2) == result


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_id": 300},
        {"token_id": 5, "top": [TokenLogprob(300, -1.0)]},
        {"scores": [TokenScore(-1.0, [TokenLogprob(1 << 31, -1.0)])]},
    ],
)
def test_a_token_outside_the_vocabulary_becomes_a_refusal_and_the_others_are_delivered(told, streams, wrong):
    told.next(1)
    good = [SpanResult("good", 1, 0, 4, 299), SpanResult("prompt", 1, 0, 4)]
    bad = SpanResult("bad", 2, 7, 1, **wrong)
    streams.append(RESULTS_STREAM, encode_entry(StepResult(1, VERSION, 1, [good[0], bad, good[1]], [], [])))
    result = told.next(2)
    assert result.spans == good
    (refusal,) = result.refusals
    assert (refusal.session_id, refusal.session_epoch, refusal.first_position) == ("bad", 2, 7)
    assert (refusal.stage_id, refusal.reason) == (1, "unknown_token")
    assert "300" in refusal.message


def test_a_full_queue_is_named_and_recovers_by_itself(told, streams):
    told.next(1)
    streams.is_full = True
    with pytest.raises(LinkLost, match="maxmemory"):
        told.pipeline.send(LiveSessions(VERSION, 1, []))
    down = told.next(2)
    assert isinstance(down, PipelineDown)
    assert "maxmemory" in down.reason
    streams.is_full = False
    assert told.next(3) == PipelineUp(VERSION, BOOT_IDS)


def test_a_queue_that_is_away_is_an_event_and_so_is_its_return(told, streams):
    told.next(1)
    streams.go_away()
    assert isinstance(told.next(2), PipelineDown)
    streams.come_back()
    assert told.next(3) == PipelineUp(VERSION, BOOT_IDS)


def test_no_event_follows_after_it_is_closed(told, streams):
    told.next(1)
    told.pipeline.close()
    streams.states = {}
    time.sleep(0.6)  # two looks
    assert len(told.events) == 1


def test_a_stage_with_direct_transport_is_named_by_a_coordinator_with_queue_transport(streams):
    streams.beat(1, transport="direct")
    events = []
    stages = tuple(StageAssignment(i, "vm", f"http://127.0.0.1:{9 + i}", i, i + 1, "float32") for i in range(2))
    pipeline = Pipeline(
        Plan(VERSION, "digest", 2, 64, 300, 256, stages), 1, "token", events.append,
        transport="queue", work_queue=streams, travel=TravelMetrics(CollectorRegistry()),
    )  # fmt: skip
    streams_missing = wait_until(lambda: pipeline._missing(pipeline._links()), SECONDS, "something is missing")
    wait_until(lambda: "NOODLE_TRANSPORT" in (pipeline._missing(pipeline._links()) or ""), SECONDS, streams_missing)
    said = pipeline._missing(pipeline._links())
    assert "stage 1 on vm has NOODLE_TRANSPORT=direct" in said
    assert "NOODLE_TRANSPORT=queue" in said
    assert events == []
    pipeline.close()
