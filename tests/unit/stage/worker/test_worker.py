"""The stage's loop over a fake slice: what it refuses, scores and logs."""

import logging
import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from noodle.cluster.plan import Plan, StageAssignment
from noodle.logs import add_request_id
from noodle.metrics.counted import StageMetrics
from noodle.wire.frames import tensor_bytes
from noodle.wire.messages import LiveSessions, SamplingParameters, Step, StepSpan
from services.stage.executors.base import SliceOutput
from services.stage.executors.hidden_states import decode, encode
from services.stage.worker import worker as worker_module
from services.stage.worker.inbox import Inbox
from services.stage.worker.results import SCORED_ROWS
from services.stage.worker.sessions import UNLISTED_SECONDS
from services.stage.worker.worker import Role, Worker

VOCABULARY = 50
PLAN = Plan(1, "digest", 1, 8, VOCABULARY, 1000, (StageAssignment(0, "test", "http://x:1", 0, 1, "float32"),))


class RowSlice:
    """The logits of row r are largest at token r; `forward` raises `fault` if there is one."""

    vocab_size = VOCABULARY

    def __init__(self, fault=None):
        self.fault, self.asked = fault, []

    def reserve(self, session_id, tokens, end):
        pass

    def forward(self, batch):
        if self.fault is not None:
            raise self.fault
        return SliceOutput(logits=self.logits_of(batch.logits_rows))

    def logits_of(self, rows):
        self.asked.append(len(rows))
        logits = np.zeros((len(rows), VOCABULARY), np.float32)
        logits[np.arange(len(rows)), np.asarray(rows) % VOCABULARY] = 5.0
        return logits

    def release(self, session_id):
        pass

    def kv_bytes_held(self):
        return 0


class Answers:
    def __init__(self):
        self.results = []

    def put(self, result):
        self.results.append(result)
        return True


def answer_of(step, model_slice, tokens):
    """Return the result of one step from a worker that computes the whole model."""
    inbox, answers = Inbox(), Answers()
    worker = Worker(0, inbox, answers.put, StageMetrics(CollectorRegistry()))
    worker.install(Role(PLAN, 0, model_slice, None), lambda: None)
    inbox.put(step, memoryview(np.zeros(tokens, np.int32).tobytes()))
    worker.stop()
    worker.run()
    (answer,) = answers.results
    return answer


def a_step(*spans):
    return Step(1, 1, 1, "int32", [sum(span.token_count for span in spans)], list(spans))


def a_span(name="a", tokens=3, **fields):
    return StepSpan(name, 1, 0, tokens, tokens + 1, **fields)


@pytest.mark.parametrize("tokens", [1, SCORED_ROWS, SCORED_ROWS + 1, 5 * SCORED_ROWS])
def test_however_many_rows_are_scored_few_logits_are_held_at_once(tokens):
    model_slice = RowSlice()
    # the second session's rows follow the first one's
    spans = (a_span("a", 2), a_span("b", tokens, scored_token_ids=[(row + 2) % 50 for row in range(tokens)]))
    scores = answer_of(a_step(*spans), model_slice, tokens + 2).spans[1].scores
    assert len(scores) == tokens
    best = 5.0 - np.log(np.exp(5.0) + VOCABULARY - 1)
    assert [score.logprob for score in scores] == pytest.approx([best] * tokens, abs=1e-5)
    assert max(model_slice.asked) <= SCORED_ROWS


def test_the_likeliest_tokens_come_only_with_a_requested_log_probability():
    asks = {"sampling": SamplingParameters(), "top_logprobs": 3}
    with_logprob, without = answer_of(
        a_step(a_span("a", 3, logprob=True, **asks), a_span("b", 3, **asks)), RowSlice(), 6
    ).spans
    assert (with_logprob.token_id, len(with_logprob.top)) == (2, 3)
    assert with_logprob.top[0].logprob == with_logprob.logprob
    assert (without.token_id, without.logprob, without.top) == (5, None, [])


@pytest.mark.parametrize("scored", [[1, 2, 3, 4], [VOCABULARY]])
def test_more_scores_than_rows_and_scores_of_unknown_tokens_are_refused(scored):
    answer = answer_of(a_step(a_span(scored_token_ids=scored)), RowSlice(), 3)
    assert [refusal.reason for refusal in answer.refusals] == ["wrong_token"]


@pytest.fixture
def lines():
    """Log lines of the worker as (request id, message)."""
    kept = []
    handler = logging.Handler()
    handler.addFilter(add_request_id)
    handler.emit = lambda record: kept.append((record.request_id, record.getMessage()))
    log = logging.getLogger("services.stage.worker.worker")
    log.addHandler(handler)
    yield kept
    log.removeHandler(handler)


def test_what_goes_wrong_with_a_step_is_logged_under_the_id_of_each_of_its_requests(lines):
    answer_of(a_step(a_span("mine-1", 3), a_span("yours-2", 3)), RowSlice(ValueError("no such thing")), 6)
    failed = [(request_id, message) for request_id, message in lines if "no such thing" in message]
    assert [request_id for request_id, _ in failed] == ["mine-1", "yours-2"]
    lines.clear()
    answer_of(a_step(a_span("mine-3", scored_token_ids=[VOCABULARY])), RowSlice(), 3)
    assert [request_id for request_id, _ in lines] == ["mine-3"]


class NotNumbers(RowSlice):
    """The first row's logits are not numbers."""

    def logits_of(self, rows):
        logits = super().logits_of(rows)
        logits[0] = np.nan
        return logits


def test_a_session_whose_logits_are_not_finite_fails_alone():
    asks = {"sampling": SamplingParameters()}
    answer = answer_of(a_step(a_span("a", 3, **asks), a_span("b", 3, **asks)), NotNumbers(), 6)
    assert [(span.session_id, span.token_id) for span in answer.spans] == [("b", 5)]
    ((refused),) = answer.refusals
    assert (refused.session_id, refused.reason) == ("a", "computation_failed")
    assert "NaN" in refused.message


def test_a_step_that_computes_for_long_costs_no_session_its_rows(monkeypatch):
    """On a slow machine a chunk may take longer than UNLISTED_SECONDS, and the lists wait behind it in the inbox."""
    late_seconds = 0.0
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: time.perf_counter() + late_seconds)

    class Slow(RowSlice):
        def forward(self, batch):
            nonlocal late_seconds
            late_seconds += 4 * UNLISTED_SECONDS
            return super().forward(batch)

    inbox, answers = Inbox(), Answers()
    worker = Worker(0, inbox, answers.put, StageMetrics(CollectorRegistry()))
    worker.install(Role(PLAN, 0, Slow(), None), lambda: None)
    for first in (0, 3, 6):
        span = StepSpan("a", 1, first, 3, 100, SamplingParameters())
        inbox.put(a_step(span), memoryview(np.zeros(3, np.int32).tobytes()))
        inbox.put(LiveSessions(PLAN.version, 1, ["a"]))
    worker.stop()
    worker.run()
    assert [span.first_position for answer in answers.results for span in answer.spans] == [0, 3, 6]
    assert not any(answer.refusals for answer in answers.results)


class PassingSlice(RowSlice):
    """Returns the same hidden states for every batch, and keeps those it received."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.came = rows, []

    def forward(self, batch):
        self.came.append(batch.hidden_states)
        return SliceOutput(hidden_states=encode(self.rows, "float32"))


class NextStage:
    def __init__(self):
        self.sent = []

    def send(self, message, body=b""):
        self.sent.append((message, body))
        return True


def sent_on(index, step, body, rows, **hop):
    """Return what the stage at `index` of three sends on, and the hidden states that its slice received."""
    stages = tuple(StageAssignment(i, "test", "http://x:1", i, i + 1, "float32", **hop) for i in range(3))
    inbox, following, model_slice = Inbox(), NextStage(), PassingSlice(rows)
    worker = Worker(index, inbox, Answers().put, StageMetrics(CollectorRegistry()))
    plan = Plan(1, "digest", 3, 8, VOCABULARY, 1000, stages)
    worker.install(Role(plan, index, model_slice, following), lambda: None)
    inbox.put(step, body)
    worker.stop()
    worker.run()
    ((message, sent),) = following.sent
    return message, sent, model_slice.came[0] if model_slice.came else None


@pytest.mark.parametrize(
    ("hop", "tokens", "dtype"),
    [
        ({}, 4, "float32"),
        ({"activation_dtype": "float16"}, 4, "float16"),
        ({"activation_dtype": "float16", "prefill_activation_dtype": "int8"}, 4, "float16"),
        ({"activation_dtype": "float16", "prefill_activation_dtype": "int8"}, 40, "int8"),
    ],
)
def test_hidden_states_travel_in_the_dtype_that_the_plan_names(hop, tokens, dtype):
    rows = np.random.default_rng(0).standard_normal((tokens, 8)).astype(np.float32)
    span = StepSpan("a", 1, 0, tokens, tokens + 1)
    step = Step(1, 1, 1, "int32", [tokens], [span])
    message, body, _ = sent_on(0, step, memoryview(np.zeros(tokens, np.int32).tobytes()), rows, **hop)
    assert (message.dtype, message.shape) == (dtype, [tokens, 8])
    assert body.nbytes == tensor_bytes(dtype, message.shape)
    _, _, came = sent_on(1, message, memoryview(bytes(body)), rows, **hop)
    assert came.dtype == ("float32" if dtype == "int8" else dtype)  # no slice computes with int8
    assert np.abs(decode(came) - rows).max() < 0.05


def test_a_dtype_that_the_plan_does_not_name_is_refused():
    rows = np.zeros((4, 8), np.float32)
    step = Step(1, 1, 1, "float16", [4, 8], [StepSpan("a", 1, 0, 4, 5)])
    message, _, came = sent_on(1, step, memoryview(bytes(64)), rows)
    assert [refusal.reason for refusal in message.refusals] == ["wrong_dtype"]
    assert came is None
