"""Sessions of forwards by hand: positions, room and age."""

import numpy as np
import pytest

from noodle.errors import Conflict, ContextTooLong, Unprocessable
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import SliceOutput
from services.stage.manual.forward import _Progress
from services.stage.worker.manual_sessions import (
    FORWARD_IDLE_SECONDS,
    MAXIMUM_FORWARD_SESSIONS,
    SMALLEST_RESERVE_TOKENS,
    ForwardSessions,
)

BYTES_PER_TOKEN = 10


def sessions_with(tokens=1000, context_length=2000):
    return ForwardSessions(tokens * BYTES_PER_TOKEN, BYTES_PER_TOKEN, context_length)


def compute(sessions, name, tokens, index=None, now=0.0):
    span, displaced = sessions.admit(name, index, tokens, now)
    sessions.computed(name, span.first_position + tokens, now)
    return span, displaced


def test_a_session_continues_at_its_end_by_default():
    sessions = sessions_with()
    assert compute(sessions, "a", 5)[0].first_position == 0
    assert compute(sessions, "a", 2)[0].first_position == 5
    assert compute(sessions, "a", 1, index=3)[0].first_position == 3
    assert compute(sessions, "a", 1)[0].first_position == 4


def test_a_gap_names_the_position_that_is_expected_and_changes_nothing():
    sessions = sessions_with()
    compute(sessions, "a", 5)
    with pytest.raises(Conflict, match="token_index 5 is expected"):
        sessions.admit("a", 6, 1, 0.0)
    with pytest.raises(Conflict, match="token_index 0 is expected"):
        sessions.admit("b", 1, 1, 0.0)
    assert len(sessions) == 1


def test_room_doubles_as_a_session_grows_and_never_passes_the_context():
    sessions = sessions_with(context_length=100)
    assert compute(sessions, "a", 1)[0].reserve_tokens == SMALLEST_RESERVE_TOKENS
    assert compute(sessions, "a", SMALLEST_RESERVE_TOKENS)[0].reserve_tokens == 100
    with pytest.raises(ContextTooLong, match="101"):
        sessions.admit("a", None, 36, 0.0)


def test_the_session_unused_for_longest_makes_way_for_a_newer_one():
    sessions = sessions_with(tokens=3 * SMALLEST_RESERVE_TOKENS)
    for now, name in enumerate("abc"):
        compute(sessions, name, 1, now=now)
    compute(sessions, "a", 1, now=5)
    assert compute(sessions, "d", 1, now=6)[1] == ["forward/b"]
    # one that grows takes the room of others, never its own
    assert compute(sessions, "d", SMALLEST_RESERVE_TOKENS, now=7)[1] == ["forward/c"]
    with pytest.raises(Conflict):
        sessions.admit("b", 1, 1, 8.0)


def test_no_more_sessions_are_held_than_allowed():
    sessions = sessions_with(tokens=1 << 20)
    for number in range(3 * MAXIMUM_FORWARD_SESSIONS):
        compute(sessions, str(number), 1, now=number)
    assert len(sessions) == MAXIMUM_FORWARD_SESSIONS


def test_a_session_that_has_no_room_even_alone_is_refused_and_displaces_nobody():
    sessions = sessions_with(tokens=100)
    compute(sessions, "a", 10)
    with pytest.raises(Unprocessable, match="room for 100"):
        sessions.admit("b", None, 101, 0.0)
    assert len(sessions) == 1


def test_a_stage_without_room_for_forwards_refuses_them():
    with pytest.raises(Unprocessable):
        ForwardSessions(0, 0, 100).admit("a", None, 1, 0.0)


def test_an_idle_session_ends_by_itself_and_a_used_one_does_not():
    sessions = sessions_with()
    compute(sessions, "a", 1, now=0.0)
    compute(sessions, "b", 1, now=FORWARD_IDLE_SECONDS / 2)
    assert sessions.expire(FORWARD_IDLE_SECONDS + 1) == ["forward/a"]
    assert len(sessions) == 1
    assert sessions.end("b") == "forward/b"
    assert sessions.end("never seen") == "forward/never seen"
    assert len(sessions) == 0


def test_a_forwards_pieces_are_kept_although_the_slice_computes_the_next_one_into_the_same_memory():
    numbers = np.zeros((2, 3), np.float32)
    output = SliceOutput(ActivationTensor("float32", numbers.shape, numbers.data.cast("B")))
    progress = _Progress(deadline=0.0)
    for value in (1, 2):
        numbers[:] = value
        progress.add(output, 2)
    found = np.frombuffer(progress.result(4).hidden_states.data, np.float32)
    assert found.tolist() == [1] * 6 + [2] * 6
