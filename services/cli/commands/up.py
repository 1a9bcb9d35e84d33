"""`noodle up`: the whole system as processes of this machine, from the model to the first answer and to the end.

Nothing it starts outlives it, and nothing but the cache stays on disk (design D10).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from noodle.config.environment import command_config
from noodle.config.settings import CommandConfig
from noodle.errors import Conflict, NotWritable, StartError
from services.cli.client.progress import Progress
from services.cli.local import valkey
from services.cli.local.cluster import (
    Wanted,
    children_environment,
    refuse_ports_in_use,
    resolve,
    service_specs,
    valkey_spec,
)
from services.cli.local.preparation import PreparedModel, prepare_model
from services.cli.local.processes import Interrupted, Signals, end_leftovers, identify, wait_until
from services.cli.local.readiness import are_ready, tell, wait_until_ready
from services.cli.local.readiness import wait_until as wait_while_supervised
from services.cli.local.run_state import RunFolder, RunPhase, RunRecord, acquire, running, write_private, writing
from services.cli.local.supervisor import ServiceSpec, Supervisor

LEFTOVER_GRACE_SECONDS = 12.0  # for what a killed `up` left: gunicorn gives open requests 10
OTHER_START_SECONDS = 5.0  # from another `up` taking the folder to its first record
QUEUE_SECONDS = 20.0  # for Valkey to answer
IDLE_SECONDS = 60.0  # between two looks at the size of the logs
READY_AGAIN_INTERVAL_SECONDS = 1.0
RECORD_AGAIN_SECONDS = 5.0  # between two tries to write the record to a disk that is full


def wanted_from(
    environment: Mapping[str, str], stage_count: int | None, model: str | None, split: str | None
) -> tuple[CommandConfig, Wanted]:
    """Check everything that can be checked before anything is started; raises ConfigurationError or StartError."""
    if sys.platform != "linux":
        raise StartError(
            f"`noodle up` starts processes the Linux way, and this is {sys.platform}.",
            cure="Use Docker (`docker compose up`), or run it inside WSL on Windows.",
        )
    config = command_config(environment)
    return config, resolve(config, environment, stage_count, model, split)


def already_running(config: CommandConfig, progress: Progress) -> bool:
    """Say so when a `noodle up` runs on this state folder."""
    record = running(config.state_dir)
    if record is None:
        return False
    progress.say(
        f"noodle is already running (pid {record.supervisor.pid}, {record.phase}): {record.model} "
        f"on {record.stage_count} stages at {record.coordinator_url}"
    )
    progress.say("`noodle status` says more, `noodle down` stops it.")
    return True


class Up:
    """One run, from the lock on its folder to the removal of it."""

    def __init__(
        self,
        config: CommandConfig,
        wanted: Wanted,
        environment: Mapping[str, str],
        folder: RunFolder,
        signals: Signals,
        progress: Progress,
        *,
        is_detached: bool,
    ) -> None:
        self._config, self._wanted, self._environment = config, wanted, environment
        self._folder, self._signals, self._progress = folder, signals, progress
        self._supervisor = Supervisor(folder)
        self._is_detached = is_detached
        self._identity = identify(os.getpid())
        self._phase: RunPhase = "starting"
        self._model: PreparedModel | None = None
        self._token = ""
        self._specs: Sequence[ServiceSpec] = ()
        self._record_is_old = False

    def start(self) -> None:
        """Bring everything up; returns when requests are answered. Raises StartError or Interrupted."""
        self._clear_what_a_dead_one_left()
        with writing(self._folder.logs_dir):
            self._folder.logs_dir.mkdir(mode=0o700)
            if self._is_detached:
                self._write_to_own_log()
        self._record()
        refuse_ports_in_use(self._wanted)
        binary = valkey.server_binary()
        self._token = self._config.cluster_token or secrets.token_urlsafe(32)
        password = secrets.token_urlsafe(32)
        write_private(self._folder.token_path, self._token.encode())
        write_private(self._folder.valkey_password_path, password.encode())
        common = children_environment(self._environment, self._config, self._folder)
        self._model = prepare_model(
            self._wanted.model,
            self._config.cache_dir,
            common,
            self._folder.log_path("model"),
            self._signals,
            self._progress,
        )
        self._record()
        self._start_queue(binary, password)
        self._specs = service_specs(self._wanted, self._config, common, self._model.folder)
        for spec in self._specs:
            self._add(spec)
        self._record()
        health = wait_until_ready(
            self._specs, self._token, self._supervisor, self._signals, self._progress, self._record
        )
        self._phase = "running"
        self._record()
        served_name = str(health.answer.get("model") or self._model.name)
        for line in welcome(self._wanted, self._model.name, served_name, self._folder, bool(self._config.api_key)):
            self._progress.say(line)
        for warning in health.warnings:
            self._progress.say(f"Note: {warning}")
        self._progress.say("`noodle down` stops it." if self._is_detached else "Ctrl-C stops it.")

    def supervise(self) -> None:
        """Keep everything running until somebody asks for the end; a full disk is said, and stops nothing."""
        waits_for_readiness = False
        while not self._signals.stop_requested:
            ended, started = self._supervisor.look()
            for end in ended:
                tell(end, self._say)
            for name in started:
                self._say(f"{name} was started again.")
            waits_for_readiness = waits_for_readiness or bool(ended or started)
            if ended or started or self._record_is_old:
                self._try_to_record()
            if waits_for_readiness and are_ready(self._specs, self._supervisor, self._token):
                waits_for_readiness = False
                self._say("Everything is ready again.")
            for name in self._supervisor.limit_logs():
                self._say(f"The older lines of {name}'s log are gone: there was no room to keep them.")
            interval_seconds = READY_AGAIN_INTERVAL_SECONDS if waits_for_readiness else IDLE_SECONDS
            if self._record_is_old:
                interval_seconds = min(interval_seconds, RECORD_AGAIN_SECONDS)
            self._signals.wait(min(interval_seconds, self._supervisor.seconds_until_restart()))

    def stop(self) -> None:
        """Stop everything in order and remove the run folder; a further Ctrl-C does it at once."""
        was_running, self._phase = self._phase == "running", "stopping"
        killed: list[str] = []
        try:
            self._try_to_record()
            if was_running:
                self._say("Stopping.")
        finally:
            killed = self._supervisor.stop(self._signals)
            self._folder.remove()
        for name in killed:
            self._say(f"{name} did not stop by itself and was killed.")

    def _say(self, text: str) -> None:
        """Tell whoever watches, who may be a terminal that was closed or a log on a full disk: then nobody hears it."""
        with contextlib.suppress(OSError):
            self._progress.say(text)

    def _write_to_own_log(self) -> None:
        """From now on, what this process prints goes to the run folder: nobody sits before it."""
        with self._folder.log_path("up").open("ab") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)

    def _start_queue(self, binary: Path, password: str) -> None:
        configuration = valkey.write_configuration(self._folder, self._wanted.valkey_port, password)
        self._add(valkey_spec(self._wanted, binary, configuration))
        port = self._wanted.valkey_port
        wait_while_supervised(
            lambda: valkey.answers(port, password), "Valkey", QUEUE_SECONDS, self._supervisor, self._signals
        )

    def _add(self, spec: ServiceSpec) -> None:
        try:
            self._supervisor.add(spec)
        except OSError as error:
            raise StartError(
                f"{spec.name} can not be started: {error.strerror} ({error.filename or spec.arguments[0]}).",
                cure="See that the disk has room, and that this machine has memory and processes to spare.",
            ) from error

    def _clear_what_a_dead_one_left(self) -> None:
        record = self._folder.read()
        if record is not None:
            children = [service.process for service in record.services if service.process is not None]
            ended = end_leftovers(children, LEFTOVER_GRACE_SECONDS)
            self._progress.say(
                f"An earlier `noodle up` (pid {record.supervisor.pid}) was killed"
                + (f"; ended what it left running: {len(ended)}." if ended else "; cleared what it left.")
            )
        self._folder.empty()

    def _try_to_record(self) -> None:
        """Write the record, or say once that it is old from now on; `supervise` tries again."""
        try:
            self._record()
            if self._record_is_old:
                self._say("The record of this run can be written again.")
            self._record_is_old = False
        except NotWritable as error:
            if not self._record_is_old:
                self._say(f"{error.message} Everything runs on, and `noodle status` shows what was before.")
                self._say("Free some space on that disk; writing it is tried again.")
            self._record_is_old = True

    def _record(self) -> None:
        self._folder.write(
            RunRecord(
                supervisor=self._identity,
                coordinator_url=self._wanted.coordinator_url,
                model=self._model.name if self._model else self._wanted.model,
                stage_count=self._wanted.stage_count,
                phase=self._phase,
                model_folder=str(self._model.folder) if self._model else "",
                services=self._supervisor.records(),
            )
        )


def run(
    config: CommandConfig,
    wanted: Wanted,
    environment: Mapping[str, str],
    progress: Progress,
    *,
    is_detached: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Start, supervise and stop; gives the exit code. Raises StartError after everything was cleared up again."""
    with Signals() as signals:
        folder = acquire(config.state_dir)
        if folder is None:
            if not wait_until(lambda: already_running(config, progress), OTHER_START_SECONDS):
                raise Conflict(f"Another process holds {config.state_dir}.", cure="Run `noodle down`, then try again.")
            on_ready()
            return 0
        one = Up(config, wanted, environment, folder, signals, progress, is_detached=is_detached)
        try:
            one.start()
            on_ready()
            one.supervise()
        except Interrupted:
            return 128 + signals.last_signal
        finally:
            one.stop()
    return 0


def welcome(wanted: Wanted, model_name: str, served_name: str, folder: RunFolder, needs_key: bool) -> list[str]:
    """What to do with it now that it runs."""
    url = wanted.coordinator_url
    key = ' -H "Authorization: Bearer $NOODLE_API_KEY"' if needs_key else ""
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    body = json.dumps({"model": served_name, "messages": question, "max_tokens": 60})
    stages = "1 stage" if wanted.stage_count == 1 else f"{wanted.stage_count} stages"
    return [
        f"noodle is ready: {model_name} on {stages}.",
        f"  OpenAI API  {url}/v1",
        f"  health      {url}/health",
        f"  logs        {folder.logs_dir}",
        '  try         noodle generate "Why is the sky blue?"',
        f"  or          curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
    ]
