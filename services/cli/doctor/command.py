"""`noodle doctor`: everything that keeps a machine out of a cluster, each finding with its cure; changes nothing.

Facts are gathered side by side, each with a limit of its own and all by a common end; what they mean is said by the
doctor_*.py files, one subject each. A check that could not be made is told as skipped, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from noodle import __version__
from noodle.config.addresses import host_of
from noodle.config.settings import CommandConfig
from noodle.errors import NoodleError
from services.cli.doctor.addresses import check_advertised, check_names, resolve, unresolved
from services.cli.doctor.docker import DockerFacts, check_docker, gather_docker
from services.cli.doctor.firewall import LOOPBACK_ALONE, FirewallFacts, check_firewall, gather_firewall
from services.cli.doctor.gpu import GPU_COMPOSE_NAME, check_gpu, gather_gpu
from services.cli.doctor.jobs import Job
from services.cli.doctor.links import Here, check_digests, check_reached, check_versions, check_way_back
from services.cli.doctor.memory import Need, check_memory, gather_memory, need_of
from services.cli.doctor.outcome import Outcome, Report, skipped, text_of
from services.cli.doctor.plan import Planned, ask_plan, check_plan
from services.cli.doctor.ports import PROJECT_NAME, PortFacts, check_port, gather_port
from services.cli.doctor.situation import UP_ROLE, Situation, find_situation, ports_to_try
from services.cli.doctor.tries import Links, try_links
from services.cli.project.programs import Run, System, is_wsl, run_program, this_system

DOCTOR_SECONDS = 28.0  # all of it, also when every packet is dropped
SPARE_SECONDS = 1.0  # of it, for what comes after Docker has not answered
NAMES_SECONDS = 10.0  # a resolver that does not answer
FINDING_EXIT_CODE = 1


def doctor(config: CommandConfig, environment: Mapping[str, str], folder: Path, *, as_json: bool) -> int:
    """Print the report; 1 when there is an error, warnings do not count."""
    began = time.monotonic()
    situation = find_situation(config, environment, folder, this_system())
    outcomes = examine(situation, run_program, config.cache_dir, began + DOCTOR_SECONDS)
    system = situation.system + (" in WSL" if is_wsl() else "")
    seconds = time.monotonic() - began
    report = Report(situation.machine, situation.role, system, __version__, round(seconds, 2), tuple(outcomes))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(text_of(report))
    return 0 if report.is_healthy else FINDING_EXIT_CODE


def examine(situation: Situation, run: Run, cache_dir: Path, end: float) -> list[Outcome]:
    """Every check, by `end` (monotonic)."""
    where, system, project = situation.machine, situation.system, situation.project
    wants_gpu = project is not None and GPU_COMPOSE_NAME in project.compose_files
    docker_job = Job("asking Docker", lambda: gather_docker(run))
    folder = project.folder if project else None
    gpu_job = Job("asking the card", lambda: gather_gpu(run, system, folder, is_wanted=wants_gpu))
    memory_job = Job("reading memory", lambda: gather_memory(run, _or_none(docker_job, end - SPARE_SECONDS), cache_dir))
    is_up = situation.role == UP_ROLE  # which listens on loopback alone
    up_facts = FirewallFacts(nothing_to_close=LOOPBACK_ALONE)
    firewall_job = Job("reading the firewall", lambda: up_facts if is_up else gather_firewall(run, system, project))
    name = (project.values.get("COMPOSE_PROJECT_NAME") if project else None) or PROJECT_NAME
    own = situation.own_ports
    port_jobs = [
        Job(f"trying port {port}", partial(gather_port, run, service, variable, address, port, own, name))
        for service, variable, address, port in ports_to_try(situation)
    ]
    hosts = [host_of(target.url) for target in situation.targets]
    names_job = Job("resolving names", lambda: unresolved(hosts, resolve))
    links_job = Job("trying the others", lambda: try_links(situation))
    plan_job = Job("asking for the plan", lambda: ask_plan(situation))

    outcomes = list(situation.outcomes)
    docker = _or_none(docker_job, end)
    outcomes += _made(
        "docker", where, lambda: check_docker(docker_job.value(end), where, system, is_needed=situation.needs_docker)
    )
    outcomes += _made("gpu", where, lambda: check_gpu(gpu_job.value(end), docker, where, system, is_wanted=wants_gpu))
    ports = [
        outcome for job in port_jobs for outcome in _made("port", where, partial(_check_port, job, where, system, end))
    ]
    outcomes += dict.fromkeys(ports)  # an address that is not this machine's is told once
    if not port_jobs:
        outcomes.append(skipped("port", where, "nothing here says which ports this machine is to publish"))
    names_end = min(end, time.monotonic() + NAMES_SECONDS)
    outcomes += _made("names", where, lambda: check_names(hosts, names_job.value(names_end), where, system))
    outcomes += [check_advertised(what, url, name, where, system) for what, url, name in situation.advertised]
    outcomes += _made("firewall", where, lambda: check_firewall(firewall_job.value(end), where, system))
    outcomes += _made("reach", where, lambda: check_links(situation, links_job.value(end)))
    planned = plan_job.value_or(end, lambda problem: Planned(reason=problem.message))
    outcomes.append(check_plan(planned, where))
    need = need_of(planned.answer["plan"], where, planned.phases) if planned.answer else None
    outcomes += _made("memory", where, lambda: _check_memory(memory_job, docker, need, planned, situation, end))
    return outcomes


def check_links(situation: Situation, links: Links) -> list[Outcome]:
    """All that the tries tell."""
    own = {reached.outcome for reached in links.from_here if reached.name in situation.own_names}
    start = "docker compose up -d" if situation.needs_docker else "noodle up"
    here = Here(situation.machine, situation.system, __version__, situation.host, "open" in own, start)
    outcomes: list[Outcome] = []
    for reached in links.from_here:
        if reached.outcome == "locked" and not (
            situation.token if reached.name != "valkey" else situation.valkey_password
        ):
            reason = f"{reached.name} answers at {reached.url}; no secret is known here to try its lock with"
            outcomes.append(skipped("lock", situation.machine, reason))
        else:
            outcomes += check_reached(reached, here)
    machines = {report.name: report.machine for report in links.reports if report.machine}
    for report in links.reports:
        outcomes += check_way_back(report, machines, here)
    outcomes += [skipped("way back", name, reason) for name, reason in links.unreported]
    if not links.reports:
        reason = "no service that answers here could be asked whom it reaches"
        outcomes.append(skipped("way back", situation.machine, reason))
    outcomes += _check_registered(situation, links, here)
    seen = [(reached.name, reached.version) for reached in links.from_here if reached.outcome == "open"]
    in_reports = [reached for report in links.reports for reached in report.results]
    seen += [(reached.name, reached.version) for reached in in_reports]
    outcomes.append(check_versions(seen, here))
    digests = [(report.name, report.model_digest) for report in links.reports]
    digests += [(reached.name, reached.model_digest) for reached in in_reports]
    outcomes.append(check_digests(digests, here))
    return outcomes


def _check_registered(situation: Situation, links: Links, here: Here) -> list[Outcome]:
    """The URLs under which stages say that they are found, where several machines take part."""
    coordinator = next((report for report in links.reports if report.name == "coordinator"), None)
    if coordinator is None:
        return []
    stages = [reached for reached in coordinator.results if reached.name.startswith("stage ")]
    machines = {stage.machine for stage in stages if stage.machine}
    if situation.is_alone and len(machines) < 2:
        return []
    variable = "NOODLE_LAN_ADDRESS in .env (or NOODLE_ADVERTISE_URL)"
    return [
        check_advertised(f"The URL of {stage.name}", stage.url, variable, stage.machine or stage.name, here.system)
        for stage in stages
    ]


def _check_port(job: Job[PortFacts], where: str, system: System, end: float) -> list[Outcome]:
    return [check_port(job.value(end), where, system)]


def _check_memory(
    job: Job[Any], docker: DockerFacts | None, need: Need | None, planned: Planned, situation: Situation, end: float
) -> list[Outcome]:
    reason = planned.reason or "the plan has no layers for this machine"
    return check_memory(job.value(end), docker, need, reason, situation.machine, situation.system)


def _or_none(job: Job[DockerFacts], end: float) -> DockerFacts | None:
    try:
        return job.value(end)
    except NoodleError:  # told as skipped where Docker itself is checked
        return None


def _made(check: str, where: str, make: Callable[[], list[Outcome]]) -> list[Outcome]:
    """A check's outcomes; one that could not be made says so."""
    try:
        return make()
    except NoodleError as problem:
        return [skipped(check, where, problem.message)]
