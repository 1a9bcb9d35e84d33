"""The coordinator's parts put together: model, tokenizer, loop, lease and records. The routes use this."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from noodle.cluster.measuring import StoreProgress
from noodle.cluster.plan import MachineReport, Plan
from noodle.cluster.transfer import TransferClock
from noodle.cluster.valkey import WorkQueue
from noodle.config.settings import CoordinatorConfig
from noodle.errors import NotFound, NotReady, QueueUnavailable, StartError, TooManyRequests
from noodle.logs import about
from noodle.metrics.counted import CoordinatorMetrics
from noodle.metrics.scraped import PlanSeen
from noodle.wire.queue_end import STREAM_TIMEOUT_SECONDS
from services.coordinator.engine.loop import EngineLoop
from services.coordinator.engine.pipeline import Pipeline, PipelineEvent
from services.coordinator.engine.recorder import Recorder
from services.coordinator.engine.request import (
    Client,
    Request,
    RequestStream,
    ended_stream,
    fit_into_context,
    refuse_what_cannot_fit,
)
from services.coordinator.engine.resume import KeptRequests
from services.coordinator.engine.scheduler import Scheduler
from services.coordinator.leadership import Leadership, progress_of, waiting_for
from services.coordinator.models.store import prepare_model
from services.coordinator.models.weight_server import WeightStore
from services.coordinator.text.answer import Answer
from services.coordinator.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RESUME_BY_KEY_SECONDS = 60.0  # `resume_seconds` of a request with an Idempotency-Key, unless it gives them
RETURN_SECONDS = 30.0  # time for any client to come back after the coordinator's restart
READ_RECORDS_RETRY_SECONDS = 1
RENDER_RETRY_SECONDS = 2  # Retry-After


@dataclass(frozen=True)
class ServedModel:
    """What a request is checked against: the names this model answers to (the first is its own), and its size."""

    names: tuple[str, ...]
    vocabulary_size: int
    created_seconds: int  # Unix time, for OpenAI's `created`


@dataclass(frozen=True)
class LoadedModel:
    """The model's folder or file, name and tokenizer."""

    path: Path
    served: ServedModel
    tokenizer: Tokenizer


class Coordinator:
    """Everything behind the routes."""

    def __init__(self, config: CoordinatorConfig, metrics: CoordinatorMetrics) -> None:
        self._config = config
        self.metrics = metrics
        self._work_queue = work_queue = WorkQueue(config.valkey_url, config.valkey_password)
        self._streams = WorkQueue(config.valkey_url, config.valkey_password, STREAM_TIMEOUT_SECONDS)
        self.recorder = Recorder(work_queue)
        self.loop = EngineLoop(
            Scheduler(config.step_tokens, config.maximum_open_requests),
            self.recorder,
            metrics,
            self._pipeline_of,
            maximum_open=config.maximum_open_requests + config.maximum_waiting_requests,
            recovery_seconds=config.recovery_seconds,
            keeps_rows=config.keeps_prefixes,
        )
        self.leadership = Leadership(config.machine, work_queue, self.loop, config.transport)
        self.weights = WeightStore(config.cache_dir)
        self.kept = KeptRequests(config.maximum_open_requests + config.maximum_waiting_requests)
        # so that slow chat templates leave the service's spare threads to other routes
        self._renders = threading.BoundedSemaphore(config.maximum_open_requests + config.maximum_waiting_requests)
        self._is_loaded = threading.Event()
        self._knows_records = threading.Event()  # of the coordinator that led before; no 404 until then
        self.loaded: LoadedModel | None = None
        self.detail = "the tokenizer to load"
        self._clock = TransferClock()
        self.failure = ""

    def load(self) -> None:
        """Fetch the model's files if they are missing, and load its tokenizer. A failure ends the start."""
        try:
            config = self._config
            prepared = prepare_model(
                config.model, config.cache_dir, self._note_progress, is_whole=not config.passes_on_hub_files
            )
            tokenizer = Tokenizer(prepared.path)
        except StartError as error:
            self.failure = str(error)
            raise
        served = ServedModel((prepared.name,), tokenizer.vocabulary_size, int(time.time()))
        self.loaded = LoadedModel(prepared.path, served, tokenizer)
        self.weights.serve(prepared.path, prepared.name)
        self._is_loaded.set()
        for note in tokenizer.chat_notes:
            log.warning("%s", note)
        log.info("serving %s from %s", prepared.name, prepared.path)

    def ready_model(self) -> LoadedModel:
        """Return the model, or raise NotReady with the progress while anything is missing."""
        loaded = self.loaded
        if loaded is None or not self.loop.state.up:
            view, state = self.leadership.view, self.loop.state
            waits = waiting_for(view, self.leadership.leads, state.detail, state.up) or [self.detail]
            raise NotReady(
                f"The cluster is not ready ({progress_of(view, False):.0%}): waiting for {'; '.join(waits)}.",
                retry_after_seconds=2,
            )
        return loaded

    def token_ids(self, prompt: str | tuple[int, ...], *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a prompt; a text that cannot fit into the context is refused before."""
        if not isinstance(prompt, str):
            return list(prompt)
        return self.ready_model().tokenizer.encode(prompt, add_special_tokens, self.plan.context_length)

    def chat_token_ids(self, messages: Sequence[Mapping[str, str]], request: Request) -> list[int]:
        """Render and tokenize a conversation; one that cannot fit into the context is refused before."""
        tokenizer = self.ready_model().tokenizer
        refuse_what_cannot_fit(
            request,
            least_tokens=tokenizer.fewest_tokens(message["content"] for message in messages),
            context_length=self.plan.context_length,
            prompt_name="messages",
        )
        if not self._renders.acquire(blocking=False):
            raise TooManyRequests(
                "Too many conversations wait to be rendered.", retry_after_seconds=RENDER_RETRY_SECONDS
            )
        try:
            prompt = tokenizer.apply_chat_template(messages)
        finally:
            self._renders.release()
        return self.token_ids(prompt, add_special_tokens=False)

    @property
    def plan(self) -> Plan:
        """The active plan. Raises NotReady if there is none."""
        plan = self.loop.state.plan
        if plan is None:
            raise NotReady("No plan is active.", retry_after_seconds=2)
        return plan

    def reports(self) -> list[MachineReport]:
        """Return the machine reports of all registered stages; empty while Valkey is away."""
        try:
            return self._work_queue.reports()
        except QueueUnavailable as error:
            log.debug("no reports read: %s", error)
            return []

    def plan_seen(self) -> PlanSeen:
        """Return the active plan and whether its pipeline is up, for /metrics."""
        state = self.loop.state
        if state.plan is None:
            return PlanSeen(0, is_up=False)
        device_names = {stage_id: stage.device_name for stage_id, stage in self.leadership.view.stages.items()}
        return PlanSeen(state.plan.version, state.plan.stages, device_names, is_up=state.up)

    def start(self, request: Request, client: Client, *, prompt_name: str) -> Answer:
        """Admit a checked request and return its answer; raises what still refuses it before the first byte.

        `prompt_name` is the body's field with the prompt. A request that came before with the same idempotency key is
        read again instead of being computed twice.
        """
        model = self.ready_model()
        request = fit_into_context(request, context_length=self.plan.context_length, prompt_name=prompt_name)
        if request.idempotency_key:
            request = replace(request, resume_seconds=request.resume_seconds or RESUME_BY_KEY_SECONDS)
            self._refuse_until_records_are_known()  # it may be one of them
        with self.kept.lock:
            stream = self.kept.find_same(request)
            self.kept.require_reader_place()
            if stream is None:
                end_token_ids = frozenset(model.tokenizer.eos_token_ids)
                stream = self.kept.add(self.loop.admission.submit(request, client, end_token_ids))
                self.metrics.prompt_tokens.inc(len(request.prompt_token_ids))
            # records of older versions lack these two, which the same body asks for again
            first = replace(stream.request, stream=request.stream, include_usage=request.include_usage)
            return Answer(first, stream.open_reader(), model.tokenizer)

    def find(self, client: Client, name: str) -> RequestStream:
        """Return a request of this client. Raises NotFound, and NotReady while records may still have to be read."""
        try:
            return self.kept.find(client, name)
        except NotFound:
            self._refuse_until_records_are_known()
            raise

    def _refuse_until_records_are_known(self) -> None:
        if not (self._knows_records.is_set() and self.leadership.leads):
            raise NotReady(
                "The coordinator has not read the requests that are recorded yet.",
                retry_after_seconds=READ_RECORDS_RETRY_SECONDS,
            )

    def resume(self, stream: RequestStream) -> Answer:
        """Read a request again from its beginning."""
        return Answer(stream.request, self.kept.open_reader(stream), self._loaded_model().tokenizer)

    def _loaded_model(self) -> LoadedModel:
        """Return the loaded model, whether or not the stages are ready. Raises NotReady until it is loaded."""
        if self.loaded is None:
            raise NotReady("The coordinator has not loaded the tokenizer yet.", retry_after_seconds=2)
        return self.loaded

    def resume_recorded(self) -> None:
        """Continue the requests of an earlier coordinator whenever this one takes the lead; a thread runs it."""
        while True:
            self.leadership.led.acquire()
            if self.leadership.stopping.is_set():
                return
            self._knows_records.clear()
            self._is_loaded.wait()
            try:
                self._resume_all()
                self._knows_records.set()
            except QueueUnavailable as error:
                log.warning("the recorded requests cannot be read, retrying: %s", error)
                self.leadership.stopping.wait(READ_RECORDS_RETRY_SECONDS)
                self.leadership.led.release()

    def _resume_all(self) -> None:
        end_token_ids = frozenset(self._loaded_model().tokenizer.eos_token_ids)
        for request, tokens in self.recorder.recorded():
            if request.outcome:
                self.kept.add(ended_stream(request, tokens))
            elif (stream := self.loop.admission.resume(request, tokens, end_token_ids, RETURN_SECONDS)) is not None:
                self.kept.add(stream)
                log.info("continuing after %d recorded tokens", len(tokens), extra=about(request.request_id))

    def _pipeline_of(self, plan: Plan, coordinator_epoch: int, tell: Callable[[PipelineEvent], None]) -> Pipeline:
        return Pipeline(
            plan,
            coordinator_epoch,
            self._config.cluster_token,
            tell,
            transport=self._config.transport,
            work_queue=self._streams,
            travel=self.metrics.travel,
        )

    def _note_progress(self, progress: StoreProgress) -> None:
        self.detail = progress.text(self._clock)
