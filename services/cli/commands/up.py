"""`noodle up`: the whole system as processes of this machine, from the model to the first answer and to the end.

Nothing it starts outlives it, and nothing but the cache stays on disk (design D10).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from noodle.config.environment import command_config, process_environment
from noodle.config.settings import CommandConfig
from noodle.errors import Conflict, NotWritable, StartError
from services.cli.client.health import Health
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import counted
from services.cli.client.run_record import RunPhase, RunRecord, identify, read_record, running
from services.cli.local import cluster, valkey
from services.cli.local.detach import report_to, start_detached
from services.cli.local.preparation import PreparedModel, prepare_model
from services.cli.local.processes import Interrupted, Signals, end_leftovers, wait_until
from services.cli.local.readiness import Start, are_ready, log_death
from services.cli.local.run_folder import RunFolder, acquire, write_private, writing
from services.cli.local.supervisor import ServiceSpec, Supervisor

OTHER_START_SECONDS = 5.0  # from another `up` taking the folder to its first record
QUEUE_SECONDS = 20.0  # from Valkey's start to its first answer
IDLE_SECONDS = 60.0  # between two looks at the size of the logs
READY_AGAIN_INTERVAL_SECONDS = 1.0  # between two looks at /health after a service died
RECORD_AGAIN_SECONDS = 5.0  # between two tries to write the record to a full disk


def up(options: argparse.Namespace) -> int:
    """Run `noodle up`: in the foreground, in the background, or as the background process itself."""
    environment = process_environment()
    if sys.platform != "linux":
        raise StartError(
            f"`noodle up` needs Linux, and this is {sys.platform}.",
            cure="Use Docker (`docker compose up`), or run it inside WSL on Windows.",
        )
    config = command_config(environment)
    spec = cluster.resolve(config, environment, options.stages, options.model, options.split)
    if options.report_to is not None:
        return report_to(
            options.report_to,
            lambda progress, on_ready: run(spec, environment, progress, is_detached=True, on_ready=on_ready),
        )
    with contextlib.closing(open_progress()) as progress:
        if already_running(config, progress):
            return 0
        if not options.detach:
            return run(spec, environment, progress)
        arguments = ["--stages", str(spec.stage_count), "--model", spec.model]
        return start_detached(arguments + (["--split", spec.split] if spec.split else []), environment, progress)


def already_running(config: CommandConfig, progress: Progress) -> bool:
    """Return whether a `noodle up` runs on this state folder, and log it."""
    record = running(config.state_dir)
    if record is None:
        return False
    progress.log(
        f"noodle is already running (pid {record.supervisor.pid}, {record.phase}): {record.model} "
        f"on {counted(record.stage_count, 'stage')} at {record.coordinator_url}"
    )
    progress.log("`noodle status` shows its state, `noodle down` stops it.")
    return True


@dataclass(kw_only=True)
class Up:
    """One run, from the locked run folder to its removal."""

    spec: cluster.ClusterSpec
    environment: Mapping[str, str]
    folder: RunFolder
    signals: Signals
    progress: Progress
    is_detached: bool

    def __post_init__(self) -> None:
        self._supervisor = Supervisor(self.folder)
        self._phase: RunPhase = "starting"
        self._model: PreparedModel | None = None
        self._token = ""
        self._specs: Sequence[ServiceSpec] = ()
        self._record_is_stale = False

    def start(self) -> None:
        """Start everything and return when requests are answered. Raises StartError or Interrupted."""
        config = self.spec.config
        self._clear_leftovers()
        with writing(self.folder.logs_dir):
            self.folder.logs_dir.mkdir(mode=0o700)
            if self.is_detached:
                with self.folder.log_path("up").open("ab") as log:
                    for descriptor in (1, 2):
                        os.dup2(log.fileno(), descriptor)
        self._record()
        cluster.refuse_ports_in_use(self.spec)
        binary = valkey.server_binary()
        self._token = config.cluster_token or secrets.token_urlsafe(32)
        password = secrets.token_urlsafe(32)
        write_private(self.folder.token_path, self._token.encode())
        write_private(self.folder.valkey_password_path, password.encode())
        common = cluster.children_environment(self.environment, config, self.folder)
        self._model = prepare_model(
            self.spec.model, config, common, self.signals, self.progress, log_path=self.folder.log_path("model")
        )
        self._record()
        start = Start(self._supervisor, self.signals, self.progress)
        configuration = valkey.write_configuration(self.folder, config.valkey_port, password)
        self._add(cluster.valkey_spec(self.spec, binary, configuration))
        start.wait_until(lambda: valkey.answers(config.valkey_port, password), "Valkey", QUEUE_SECONDS)
        self._specs = cluster.service_specs(self.spec, common, self._model.path)
        for spec in self._specs:
            self._add(spec)
        self._record()
        health = start.wait_until_ready(self._specs, self._token, self._record)
        self._phase = "running"
        self._record()
        for line in self._welcome(health):
            self.progress.log(line)
        for warning in health.warnings:
            self.progress.log(f"Note: {warning}")
        self.progress.log("`noodle down` stops it." if self.is_detached else "Ctrl-C stops it.")

    def supervise(self) -> None:
        """Keep everything running until a stop is requested; a full disk is logged and stops nothing."""
        waits_for_readiness = False
        while not self.signals.stop_requested:
            ended, started = self._supervisor.look()
            for end in ended:
                log_death(end, self._log)
            for name in started:
                self._log(f"{name} was restarted.")
            waits_for_readiness = waits_for_readiness or bool(ended or started)
            if ended or started or self._record_is_stale:
                self._try_to_record()
            if waits_for_readiness and are_ready(self._specs, self._supervisor, self._token):
                waits_for_readiness = False
                self._log("Everything is ready again.")
            for name in self._supervisor.limit_logs():
                self._log(f"The older lines of {name}'s log were dropped: the disk is full.")
            interval_seconds = READY_AGAIN_INTERVAL_SECONDS if waits_for_readiness else IDLE_SECONDS
            if self._record_is_stale:
                interval_seconds = min(interval_seconds, RECORD_AGAIN_SECONDS)
            self.signals.wait(min(interval_seconds, self._supervisor.seconds_until_restart()))

    def stop(self) -> None:
        """Stop everything in order and remove the run folder; a further Ctrl-C kills what is left."""
        was_running, self._phase = self._phase == "running", "stopping"
        try:
            self._try_to_record()
            if was_running:
                self._log("Stopping.")
        finally:
            killed = self._supervisor.stop(self.signals)
            self.folder.remove()
        for name in killed:
            self._log(f"{name} did not stop in time and was killed.")

    def _log(self, text: str) -> None:
        """Log a line; the terminal may have been closed, or the log's disk may be full."""
        with contextlib.suppress(OSError):
            self.progress.log(text)

    def _add(self, spec: ServiceSpec) -> None:
        try:
            self._supervisor.add(spec)
        except OSError as error:
            raise StartError(
                f"{spec.name} cannot be started: {error.strerror} ({error.filename or spec.arguments[0]}).",
                cure="Check that the disk has room, and that this machine has memory and processes to spare.",
            ) from error

    def _clear_leftovers(self) -> None:
        record = read_record(self.folder.path)
        if record is not None:
            ended = end_leftovers(record)
            left = f"ended {counted(len(ended), 'process', 'processes')}" if ended else "removed the files"
            self.progress.log(f"An earlier `noodle up` (pid {record.supervisor.pid}) was killed; {left} that it left.")
        self.folder.empty()

    def _try_to_record(self) -> None:
        """Write the record; if the disk is full, log it once, and `supervise` tries again."""
        try:
            self._record()
            if self._record_is_stale:
                self._log("The record of this run can be written again.")
            self._record_is_stale = False
        except NotWritable as error:
            if not self._record_is_stale:
                self._log(f"{error.message} Everything keeps running; `noodle status` shows an older state.")
                self._log("Free some space on that disk; noodle tries again.")
            self._record_is_stale = True

    def _record(self) -> None:
        self.folder.write(
            RunRecord(
                supervisor=identify(os.getpid()),
                coordinator_url=self.spec.coordinator_url,
                model=self._model.name if self._model else self.spec.model,
                stage_count=self.spec.stage_count,
                phase=self._phase,
                model_path=str(self._model.path) if self._model else "",
                services=self._supervisor.records(),
            )
        )

    def _welcome(self, health: Health) -> list[str]:
        """The lines for a cluster that has just become ready; each example in them works as it is printed."""
        url = self.spec.coordinator_url
        name = self._model.name if self._model else ""
        served_name = str(health.answer.get("model") or name)
        key = ' -H "Authorization: Bearer $NOODLE_API_KEY"' if self.spec.config.api_key else ""
        body: dict[str, object] = {"model": served_name}
        if health.has_chat_template:
            route, example = "/v1/chat/completions", 'noodle generate "Why is the sky blue?"'
            body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
        else:
            route, example = "/v1/completions", 'noodle generate --raw "The sky is blue because"'
            body["prompt"] = "The sky is blue because"
        data = shlex.quote(json.dumps(body | {"max_tokens": 60}, ensure_ascii=False))
        stages = counted(self.spec.stage_count, "stage")
        return [
            f"noodle is ready: {name or served_name} on {stages}.",
            f"  OpenAI API  {url}/v1",
            f"  health      {url}/health",
            f"  logs        {self.folder.logs_dir}",
            f"  try         {example}",
            f"  or          curl {url}{route}{key} -H 'Content-Type: application/json' -d {data}",
        ]


def run(
    spec: cluster.ClusterSpec,
    environment: Mapping[str, str],
    progress: Progress,
    *,
    is_detached: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Start, supervise and stop; return the exit code. Raises StartError after everything was cleaned up."""
    config = spec.config
    with Signals() as signals:
        folder = acquire(config.state_dir)
        if folder is None:
            if not wait_until(lambda: already_running(config, progress), OTHER_START_SECONDS):
                raise Conflict(f"Another process holds {config.state_dir}.", cure="Run `noodle down`, then try again.")
            on_ready()
            return 0
        one = Up(
            spec=spec,
            environment=environment,
            folder=folder,
            signals=signals,
            progress=progress,
            is_detached=is_detached,
        )
        try:
            one.start()
            on_ready()
            one.supervise()
        except Interrupted:
            return 128 + signals.last_signal
        finally:
            one.stop()
    return 0
