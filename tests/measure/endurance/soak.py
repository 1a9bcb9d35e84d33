"""Mixed load for 15 minutes with a kill every half minute: all requests must end, and nothing may leak."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.measure.correctness.kills import EMPTY_SECONDS
from tests.measure.endurance.memory import proportional_bytes
from tests.measure.report import Section
from tests.support.clients.kill_runs import SERVICES_OF, killer, pids_of, processes_of
from tests.support.clients.mixed_load import KINDS, Ledger, Load, asked_undisturbed
from tests.support.models.real_model import real_model_file
from tests.support.processes.cluster import Cluster, wait_until

MINUTES = 15.0
CLIENTS = 6
KILL_EVERY_SECONDS = 30.0
EARLY_SECONDS = 120.0  # first memory reading; a quarter of a shorter run
WHOLE_AGAIN_SECONDS = 120.0
FREEZE = "stage 1 stands still for 6 s"
FREEZE_SECONDS = 6.0
DEATHS = (*SERVICES_OF, "valkey, then the coordinator", FREEZE)
SERVICES = ("coordinator", "planner", "valkey", "stage-0", "stage-1")


def measure(minutes: float | str = MINUTES) -> Section:
    """Measure; failures are reported in the section."""
    minutes = float(minutes)
    section = Section("soak", "A soak with deaths")
    section.say(
        f"{minutes:g} minutes, SmolLM2-135M-Instruct in its file's Q4_1, two stages of one thread on two shared cores. "
        f"{CLIENTS} clients: prompts of 5 to 800 tokens, 16 to 48 new ones, greedy and drawn with a seed, streams and "
        f"whole answers and chats. Every {KILL_EVERY_SECONDS:.0f} s a random one of: `kill -9` of "
        f"{', '.join(SERVICES_OF)}, Valkey and 2 s later the coordinator; {FREEZE}. "
        "A request without a key and without `resume_seconds` may break when the coordinator dies; "
        "every other one must be answered, with the tokens that it gets undisturbed."
    )
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch) / "s", real_model_file(), 2, NOODLE_QUALITY="stored").start()
        try:
            soak = Soak(cluster, minutes * 60.0)
            soak.run()
        finally:
            cluster.stop()
        left = len(processes_of(cluster))
    soak.tell(section)
    section.say(
        f"KV bytes held after the last request: {soak.held_bytes}. Processes of the cluster: {soak.processes_before} "
        f"before, {soak.processes_after} after the last death, {left} after `noodle up` was told to stop."
    )
    return section


class Soak:
    """One run on a running cluster."""

    def __init__(self, cluster: Cluster, seconds: float) -> None:
        self.cluster, self.seconds = cluster, seconds
        self.coordinator_died_at: list[float] = []
        self.deaths = dict.fromkeys(DEATHS, 0)
        self.memory: list[dict[str, int]] = []
        self.hanging = self.held_bytes = self.processes_before = self.processes_after = 0
        self.load = Load(cluster, asked_undisturbed(cluster), self.coordinator_died_since, CLIENTS)

    def run(self) -> None:
        """Run load and kills, then examine what is left."""
        self.processes_before = len(processes_of(self.cluster))
        chance = random.Random(11)
        began_at = time.monotonic()
        self.load.start()
        early_at = began_at + min(EARLY_SECONDS, self.seconds / 4)
        next_death_at = began_at + KILL_EVERY_SECONDS
        deaths: list[str] = []
        while (now := time.monotonic()) < began_at + self.seconds:
            if now >= next_death_at:
                next_death_at += KILL_EVERY_SECONDS
                deaths = deaths or chance.sample(DEATHS, len(DEATHS))  # each kind occurs equally often
                self.kill(deaths.pop())
            if not self.memory and now >= early_at and self.cluster.is_ready():
                self.memory.append(self.memory_now())
            time.sleep(0.2)
        wait_until(self.cluster.is_ready, WHOLE_AGAIN_SECONDS, "it is whole again")
        time.sleep(5.0)  # the service started last works again too
        self.memory.append(self.memory_now())
        self.hanging = self.load.stop()
        try:
            wait_until(self.cluster.is_empty, EMPTY_SECONDS, "only kept KV rows are left")
        except AssertionError:
            self.held_bytes = self.cluster.kv_bytes_held()
        self.processes_after = len(processes_of(self.cluster))

    def kill(self, kind: str) -> None:
        """Let one kind of death happen; a service that is away at this moment is skipped."""
        print(f"{time.strftime('%X')} {kind}", flush=True)
        self.deaths[kind] += 1
        try:
            if kind == FREEZE:
                freeze(pids_of(self.cluster, "stage-1"))
                return
            if "coordinator" in kind or "machine" in kind:
                self.coordinator_died_at.append(time.monotonic() + (2.0 if "valkey" in kind else 0.0))
            killer(self.cluster, kind)()
        except (OSError, TypeError, ValueError, StopIteration) as error:
            print(f"not there to be killed: {error!r}", flush=True)

    def coordinator_died_since(self, began_at: float) -> bool:
        """Return whether the coordinator died after this time."""
        return any(died_at > began_at - 1.0 for died_at in self.coordinator_died_at)

    def memory_now(self) -> dict[str, int]:
        """Return the memory of each service with its master, of `noodle up`, and the stages' KV bytes."""
        taken = {"noodle up": proportional_bytes(self.cluster.process.pid)}
        for name in SERVICES:
            taken[name] = sum(proportional_bytes(pid) for pid in pids_of(self.cluster, name))
        for state in self.cluster.stage_states():  # rows of ended sessions are kept until the room is needed
            taken[f"KV rows of stage-{state['stage_id']}"] = int(state["kv_bytes_held"])
        return taken

    def tell(self, section: Section) -> None:
        """Write the tables."""
        ledger = self.load.ledger
        rows = []
        for kind in KINDS:
            outcomes = ledger.outcomes.get(kind, {})
            told = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()) if name[:5] != "wrong")
            wrong = sum(count for name, count in outcomes.items() if name[:5] == "wrong")
            rows.append([kind, ledger.sent[kind], sum(outcomes.values()), told, wrong])
        answered = sum(sum(outcomes.values()) for outcomes in ledger.outcomes.values())
        rows.append(["all", sum(ledger.sent.values()), answered, "", len(ledger.wrong)])
        section.table(["requests", "sent", "ended", "of them", "wrong"], rows)
        for line in ledger.wrong:
            section.say(f"Wrong: {line[:300]}")
        deaths = ", ".join(f"{kind} {count}" for kind, count in self.deaths.items())
        section.say(
            f"Deaths: {deaths}. Clients that hang: {self.hanging}. Answers of 429 or 503, all with Retry-After, after "
            f"which a client came again: {ledger.refusals}. Streams accepted, lost before their first token and sent "
            f"again with their key: {ledger.sent_again}. {self.parted(ledger)}"
        )
        early, late = self.memory
        early_at = min(EARLY_SECONDS, self.seconds / 4) / 60
        section.table(
            ["Pss_Anon under load", *early],
            [
                [f"minute {early_at:g}", *(f"{taken / 1e6:.0f} MB" for taken in early.values())],
                ["the end", *(f"{taken / 1e6:.0f} MB" for taken in late.values())],
            ],
        )

    @staticmethod
    def parted(ledger: Ledger) -> str:
        """Return how many answers have the tokens of the undisturbed run, and the requests of all others."""
        compared = sum(outcomes["answered"] for outcomes in ledger.outcomes.values())
        equal = compared - len(ledger.parted)
        bodies = "".join(f" **Another answer: {str(asked.body)[:200]}**" for asked, _ in ledger.parted)
        return f"Answers with the tokens of the undisturbed run: {equal} of {compared}.{bodies}"


def freeze(pids: Sequence[int]) -> None:
    """Stop processes, and continue them later."""

    def tell(number: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # killed meanwhile

    tell(signal.SIGSTOP)
    threading.Timer(FREEZE_SECONDS, tell, [signal.SIGCONT]).start()
