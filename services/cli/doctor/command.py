"""`noodle doctor`: finds what keeps a machine out of a cluster, each finding with its cure; changes nothing.

Facts are gathered in parallel, each with its own time limit and all by a common end; the other files of this folder
judge them. A check that could not be made is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from noodle import __version__
from noodle.config.addresses import host_of
from noodle.config.environment import command_config, process_environment
from noodle.errors import NoodleError
from services.cli.client.reports import print_json
from services.cli.doctor import links
from services.cli.doctor.capacity import Planned, ask_plan, check_memory, check_plan, gather_memory, need_of
from services.cli.doctor.context import UP_ROLE, MachineContext, find_context, ports_to_try
from services.cli.doctor.docker import DockerFacts, check_docker, gather_docker
from services.cli.doctor.firewall import LOOPBACK_ONLY, FirewallFacts, check_firewall, gather_firewall
from services.cli.doctor.gpu import check_gpu, gather_gpu
from services.cli.doctor.ports import PROJECT_NAME, Port, check_port, gather_port
from services.cli.doctor.probes import Job, Links, probe_links
from services.cli.doctor.results import CheckResult, Report, skipped, text_of
from services.cli.project.machine_settings import GPU_FILE
from services.cli.project.programs import Run, is_wsl, run_program, this_system

DOCTOR_SECONDS = 28.0  # all of `noodle doctor`, also if every packet is dropped
SPARE_SECONDS = 1.0  # of it, for what follows when Docker has not answered
NAMES_SECONDS = 10.0  # the resolver's answers
FINDING_EXIT_CODE = 1


def doctor(options: argparse.Namespace) -> int:
    """Print the report; 1 if it has an error, warnings do not count."""
    began = time.monotonic()
    environment = process_environment()
    config = command_config(environment)
    context = find_context(config, environment, Path.cwd(), this_system())
    results = examine(context, run_program, config.cache_dir, began + DOCTOR_SECONDS)
    report = Report(
        machine=context.machine,
        role=context.role,
        system=context.system + (" in WSL" if is_wsl() else ""),
        version=__version__,
        seconds=round(time.monotonic() - began, 2),
        results=tuple(results),
    )
    if options.json:
        print_json(report)
    else:
        print(text_of(report))
    return 0 if report.is_healthy else FINDING_EXIT_CODE


def examine(context: MachineContext, run: Run, cache_dir: Path, end: float) -> list[CheckResult]:
    """Make every check by `end` (monotonic)."""
    where, system, project = context.machine, context.system, context.project
    wants_gpu = project is not None and GPU_FILE in project.compose_files
    docker_job = Job("asking Docker", lambda: gather_docker(run))
    folder = project.folder if project else None
    gpu_job = Job("asking the card", lambda: gather_gpu(run, system, folder, is_wanted=wants_gpu))
    memory_job = Job("reading memory", lambda: gather_memory(run, _or_none(docker_job, end - SPARE_SECONDS), cache_dir))
    is_up = context.role == UP_ROLE  # which listens on loopback only
    up_facts = FirewallFacts(nothing_to_close=LOOPBACK_ONLY)
    firewall_job = Job("reading the firewall", lambda: up_facts if is_up else gather_firewall(run, system, project))
    name = (project.values.get("COMPOSE_PROJECT_NAME") if project else None) or PROJECT_NAME

    def try_port(port: Port) -> list[CheckResult]:
        return [check_port(gather_port(run, port, context.own_ports, name), where, system)]

    port_jobs = [Job(f"trying port {port.number}", partial(try_port, port)) for port in ports_to_try(context)]
    hosts = [host_of(target.url) for target in context.targets]
    names_job = Job("resolving names", lambda: links.unresolved(hosts, partial(socket.getaddrinfo, port=None)))
    links_job = Job("trying the others", lambda: probe_links(context))
    plan_job = Job("asking for the plan", lambda: ask_plan(context))

    results = list(context.results)
    docker = _or_none(docker_job, end)
    results += _attempt(
        "docker", where, lambda: check_docker(docker_job.value(end), where, system, is_needed=context.needs_docker)
    )
    results += _attempt("gpu", where, lambda: check_gpu(gpu_job.value(end), docker, where, system, is_wanted=wants_gpu))
    ports = [result for job in port_jobs for result in _attempt("port", where, partial(job.value, end))]
    results += dict.fromkeys(ports)  # an address that is not this machine's is reported once
    if not port_jobs:
        results.append(skipped("port", where, "the ports that this machine publishes are unknown"))
    names_end = min(end, time.monotonic() + NAMES_SECONDS)
    results += _attempt("names", where, lambda: links.check_names(hosts, names_job.value(names_end), where, system))
    results += [links.check_advertised(what, url, name, where, system) for what, url, name in context.advertised]
    results += _attempt("firewall", where, lambda: check_firewall(firewall_job.value(end), where, system))
    results += _attempt("reach", where, lambda: check_links(context, links_job.value(end)))
    try:
        planned = plan_job.value(end)
    except NoodleError as problem:
        planned = Planned(reason=problem.message)
    results.append(check_plan(planned, where))
    need = need_of(planned.answer["plan"], where, planned.phases) if planned.answer else None
    reason = planned.reason or "the plan has no layers for this machine"
    results += _attempt(
        "memory", where, lambda: check_memory(memory_job.value(end), docker, need, where, system, why_no_need=reason)
    )
    return results


def check_links(context: MachineContext, probed: Links) -> list[CheckResult]:
    own = {reached.outcome for reached in probed.from_here if reached.name in context.own_names}
    here = links.Here(
        machine=context.machine,
        system=context.system,
        version=__version__,
        host=context.host,
        is_running="open" in own,
        start_command="docker compose up -d" if context.needs_docker else "noodle up",
    )
    results: list[CheckResult] = []
    for reached in probed.from_here:
        secret = context.valkey_password if reached.name == "valkey" else context.token
        if reached.outcome == "locked" and not secret:
            reason = f"{reached.name} answers at {reached.url}, but its secret is unknown here"
            results.append(skipped("lock", context.machine, reason))
        else:
            results += links.check_reached(reached, here)
    machines = {report.name: report.machine for report in probed.reports if report.machine}
    for report in probed.reports:
        results += links.check_way_back(report, machines, here)
    results += [skipped("way back", name, reason) for name, reason in probed.unreported]
    if not probed.reports:
        results.append(skipped("way back", context.machine, "no service could be asked which others it reaches"))
    results += _check_registered(context, probed, here)
    in_reports = [reached for report in probed.reports for reached in report.results]
    seen = [*(reached for reached in probed.from_here if reached.outcome == "open"), *in_reports]
    results.append(links.check_versions([(reached.name, reached.version) for reached in seen], here))
    digests = [(report.name, report.model_digest) for report in probed.reports]
    digests += [(reached.name, reached.model_digest) for reached in in_reports]
    results.append(links.check_digests(digests, here))
    return results


def _check_registered(context: MachineContext, probed: Links, here: links.Here) -> list[CheckResult]:
    """Judge the URLs that stages registered, in a cluster of several machines."""
    known = next((report.results for report in probed.reports if report.name == "coordinator"), ())
    stages = [reached for reached in known if reached.name.startswith("stage ")]
    machines = {stage.machine for stage in stages if stage.machine}
    variable, system = "NOODLE_LAN_ADDRESS in .env (or NOODLE_ADVERTISE_URL)", here.system
    return (
        []
        if context.is_alone and len(machines) < 2
        else [
            links.check_advertised(f"The URL of {stage.name}", stage.url, variable, stage.machine or stage.name, system)
            for stage in stages
        ]
    )


def _or_none(job: Job[DockerFacts], end: float) -> DockerFacts | None:
    try:
        return job.value(end)
    except NoodleError:  # the check of Docker itself reports it
        return None


def _attempt(check: str, where: str, make: Callable[[], list[CheckResult]]) -> list[CheckResult]:
    """Return a check's results, or that it was skipped."""
    try:
        return make()
    except NoodleError as problem:
        return [skipped(check, where, problem.message)]
