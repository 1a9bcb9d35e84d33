"""The coordinator put together: model files, tokenizer, loop, lead and records; the routes act on this."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noodle.config import CoordinatorConfig
from noodle.errors import NotReady, StartError
from noodle.hop_queue import STREAM_TIMEOUT_SECONDS
from noodle.metrics import CoordinatorMetrics
from noodle.plan import MachineReport, Plan
from noodle.work_queue import WorkQueue
from services.coordinator.answer import Answer
from services.coordinator.event_streams import Started
from services.coordinator.generate import GenerationLoop
from services.coordinator.generation import LOOPBACK, Client, GenerationRequest
from services.coordinator.leadership import Leadership, progress_of, waiting_for
from services.coordinator.model_progress import Progress
from services.coordinator.model_store import prepare_model
from services.coordinator.openai_request import ServedModel
from services.coordinator.openai_stream import now_seconds
from services.coordinator.parameters import GenerationParameters, fit_into_context, refuse_what_can_not_fit
from services.coordinator.pipeline import Pipeline, PipelineEvent
from services.coordinator.recorder import Recorder
from services.coordinator.scheduler import Scheduler
from services.coordinator.text_stream import TextStream
from services.coordinator.tokenizer import Tokenizer
from services.coordinator.weight_store import WeightStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """What the coordinator knows of the model: its text side and its name."""

    folder: Path
    served: ServedModel
    tokenizer: Tokenizer


class Engine:
    """Everything behind the routes."""

    def __init__(self, config: CoordinatorConfig, metrics: CoordinatorMetrics) -> None:
        self._config = config
        self.metrics = metrics
        self._work_queue = work_queue = WorkQueue(config.valkey_url, config.valkey_password)
        self._streams = WorkQueue(config.valkey_url, config.valkey_password, STREAM_TIMEOUT_SECONDS)
        self.recorder = Recorder(work_queue)
        self.loop = GenerationLoop(
            Scheduler(config.step_tokens, config.maximum_open_requests),
            self.recorder,
            metrics,
            self._pipeline_of,
            maximum_open=config.maximum_open_requests + config.maximum_waiting_requests,
            recovery_seconds=config.recovery_seconds,
        )
        self.leadership = Leadership(config.machine, work_queue, self.loop, config.transport)
        self.weights = WeightStore(config.cache_dir)
        self.loaded: LoadedModel | None = None
        self.detail = "the tokenizer to load"
        self.failure = ""

    def load(self) -> None:
        """Fetch the model's files if need be and load its tokenizer; a failure ends the start."""
        try:
            prepared = prepare_model(self._config.model, self._config.cache_dir, self._say)
            tokenizer = Tokenizer(prepared.folder)
        except StartError as error:
            self.failure = str(error)
            raise
        served = ServedModel((prepared.name,), tokenizer.vocabulary_size, now_seconds())
        self.loaded = LoadedModel(prepared.folder, served, tokenizer)
        self.weights.serve(prepared.folder, prepared.name)
        log.info("serving %s from %s", prepared.name, prepared.folder)

    def ready_model(self) -> LoadedModel:
        """The model's text side; raises NotReady with progress while anything is missing."""
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
        """A prompt as token ids; a text that can not fit into the context is refused before it is tokenised."""
        if not isinstance(prompt, str):
            return list(prompt)
        return self.ready_model().tokenizer.encode(prompt, add_special_tokens, self.context_length)

    def chat_token_ids(self, messages: Sequence[Mapping[str, str]], parameters: GenerationParameters) -> list[int]:
        """A conversation as token ids; one that can not fit into the context is refused before it is rendered."""
        tokenizer = self.ready_model().tokenizer
        refuse_what_can_not_fit(
            parameters,
            least_tokens=tokenizer.fewest_tokens(message["content"] for message in messages),
            context_length=self.context_length,
            prompt_name="messages",
        )
        return self.token_ids(tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def reports(self) -> list[MachineReport]:
        """What every stage that beats says of its machine; raises QueueUnavailable."""
        return self._work_queue.reports()

    @property
    def plan(self) -> Plan:
        """The active plan; raises NotReady without one."""
        plan = self.loop.state.plan
        if plan is None:
            raise NotReady("No plan is active.", retry_after_seconds=2)
        return plan

    @property
    def context_length(self) -> int:
        """Tokens of the longest session that the active plan promises."""
        return self.plan.context_length

    def start(
        self,
        token_ids: list[int],
        parameters: GenerationParameters,
        prompt_name: str,
        *,
        goes_on: bool = True,
        client: Client = LOOPBACK,
        request_id: str = "",
    ) -> Started:
        """Send a checked request on its way; raises what still refuses it before the first byte.

        `goes_on` says that the answer continues the prompt's own text, and does not begin one of its own as in a chat.
        """
        model = self.ready_model()
        parameters = fit_into_context(
            parameters, prompt_tokens=len(token_ids), context_length=self.context_length, prompt_name=prompt_name
        )
        end_token_ids = frozenset() if parameters.ignore_eos else frozenset(model.tokenizer.eos_token_ids)
        generation = self.loop.submit(
            GenerationRequest(
                token_ids,
                parameters.max_new_tokens,
                parameters.sampling,
                end_token_ids,
                parameters.stop,
                parameters.scores.wanted,
                parameters.scores.top,
                parameters.scores.of_prompt,
                client,
                request_id,
            )
        )
        self.metrics.prompt_tokens.inc(len(token_ids))
        text_stream = TextStream(model.tokenizer.decode, parameters.stop, context_ids=token_ids if goes_on else ())
        return Started(Answer(generation, text_stream), parameters, token_ids, model.tokenizer)

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

    def _say(self, progress: Progress) -> None:
        self.detail = progress.text()
