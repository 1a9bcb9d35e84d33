"""The control of `noodle bench`: the unsplit model in its own process, with the resources of this machine's stages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from noodle.cluster.measuring import ControlLine, ControlQuestion, ControlReady, ControlRun
from noodle.errors import GenerationFailed
from services.cli.bench.cluster import Prompt
from services.cli.bench.report import RunTimes, StageConditions
from services.cli.client.run_record import RunRecord
from services.cli.local.conversation import Conversation
from services.cli.local.processes import session_members
from services.cli.verify.bounds import BOUNDS

LOAD_SECONDS = 900.0  # reading the whole model from a slow disk
RUN_SECONDS = 3600.0  # one run


class Control:
    """The process that computes with the unsplit model."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def load(self, question: ControlQuestion) -> ControlReady:
        """Load the model; raises NoodleError or Interrupted, as `run` does."""
        self._conversation.send(question)
        ready = self._conversation.receive(ControlLine, LOAD_SECONDS).ready
        if ready is None:
            raise GenerationFailed("The control did not report that it is ready.")
        return ready

    def run(self, prompts: Sequence[Prompt], new_tokens: int) -> RunTimes:
        """Generate from all prompts as one batch, so that each token comes for all of them together."""
        self._conversation.send(ControlRun(tuple(prompts), new_tokens))
        times = self._conversation.receive(ControlLine, RUN_SECONDS).times
        if times is None:
            raise GenerationFailed("The control answered a run without times.")
        return RunTimes(len(prompts[0]), (times.arrivals_seconds,) * len(prompts))


def control_question(
    folder: Path,
    context_length: int,
    stages: Sequence[StageConditions],
    machine: str,
    *,
    stage_cores: Sequence[int],
    own_cores: int,
) -> ControlQuestion:
    """Return what the control may compute with: threads, cores, device and dtype of this machine's stages.

    `stage_cores` are those of the stages of a `noodle up` here, empty if unknown. Without a stage on this machine the
    control gets all `own_cores`. If the cluster's dtypes differ, those of this machine's stages decide; if they differ
    too, it is float32.
    """
    here = [stage for stage in stages if stage.machine == machine]
    cores = len(stage_cores) or own_cores
    threads = sum(stage.threads for stage in here) or cores
    dtypes = {stage.dtype for stage in stages}
    if len(dtypes) > 1:
        dtypes = {stage.dtype for stage in here}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return ControlQuestion(
        folder=str(folder),
        device="cuda" if any(stage.device == "cuda" for stage in here) else "cpu",
        dtype=dtype if dtype in BOUNDS else "float32",
        threads=min(threads, cores),
        cores=tuple(stage_cores),
        context_length=context_length,
    )


def cores_of_stages(record: RunRecord | None) -> tuple[int, ...]:
    """Return the cores of all computing processes of a `noodle up`; empty if none runs here."""
    cores: set[int] = set()
    for service in record.services if record is not None else ():
        if service.name.startswith("stage-") and service.process is not None:
            leader = service.process.pid
            workers = [pid for pid in session_members(leader) if pid != leader]  # gunicorn's master computes nothing
            for pid in workers or [leader]:
                with contextlib.suppress(ProcessLookupError):  # it is just being restarted
                    cores |= os.sched_getaffinity(pid)
    return tuple(sorted(cores))
