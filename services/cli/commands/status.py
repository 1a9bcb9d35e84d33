"""`noodle status`: what runs, where, and its state, from the run folder, /health and the processes; changes nothing."""

from __future__ import annotations

import argparse
from typing import Any

from noodle.config.environment import command_config, process_environment
from services.cli.client.health import Health, ask_health
from services.cli.client.reports import print_json, print_table
from services.cli.client.run_record import ServiceRecord
from services.cli.client.target import Target, find_target
from services.cli.local.processes import proportional_set_bytes, session_members

NOT_RUNNING_EXIT_CODE = 1
FROM_PLAN = ("machine", "layers", "dtype", "executor", "weights")  # what the coordinator reports about each stage
TITLES = ("service", "pid", "port", "state", "restarts", "machine", "layers", "computed by", "memory")


def status(options: argparse.Namespace) -> int:
    """Print the state; 0 if a coordinator answers or starts, 1 if nothing runs."""
    target = find_target(command_config(process_environment()), options.url)
    coordinator = ask_health(target.url, target.token)
    is_running = target.record is not None or coordinator.status != "silent"
    seen = _state(target, coordinator) if is_running else {"running": False, "url": target.url}
    if options.json:
        print_json(seen)
    elif is_running:
        _print(seen)
    else:
        print(
            f"noodle is not running: nothing answers at {target.url}. Start it with `noodle up` (with Docker: "
            "`docker compose up`). If you started it just now, wait a moment."
        )
    return 0 if is_running else NOT_RUNNING_EXIT_CODE


def _state(target: Target, coordinator: Health) -> dict[str, Any]:
    record = target.record
    stages = {f"stage-{stage.get('stage_id')}": stage for stage in coordinator.stages}
    if record is not None:
        rows = [_local_row(service, target.token) for service in record.services]
    else:
        rows = [
            {"name": name, "state": str(stage.get("phase", "")), "detail": str(stage.get("detail", ""))}
            for name, stage in stages.items()
        ]
    for row in rows:
        if row["name"] in stages:
            row.update({name: stages[row["name"]].get(name) for name in FROM_PLAN})
    return {
        "running": True,
        "url": target.url,
        "status": coordinator.status,
        "detail": coordinator.detail,
        "phase": record.phase if record else None,
        "pid": record.supervisor.pid if record else None,
        "model": record.model if record else coordinator.answer.get("model"),
        "services": rows,
        "warnings": coordinator.warnings,
        "coordinator": coordinator.answer,
    }


def _local_row(service: ServiceRecord, token: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": service.name,
        "pid": service.process.pid if service.process and service.phase == "running" else None,
        "port": service.port,
        "state": service.phase,
        "restarts": service.restarts,
        "detail": "",
        "memory_bytes": None,
    }
    if service.process is None or service.phase != "running":
        return row
    row["memory_bytes"] = sum(map(proportional_set_bytes, session_members(service.process.pid)))
    if service.name != "valkey":  # it does not speak HTTP
        health = ask_health(service.port, token)
        row["state"] = health.status
        row["detail"] = health.detail
    return row


def _print(seen: dict[str, Any]) -> None:
    head = f"{seen['model'] or 'noodle'} at {seen['url']}: {seen['status']}"
    print(head + (f" ({seen['detail']})" if seen["detail"] not in ("", seen["status"]) else ""))
    for warning in seen["warnings"]:
        print(f"Note: {warning}")
    if seen["pid"]:
        print(f"`noodle up` is {seen['phase']}, pid {seen['pid']}.")
    if seen["services"]:
        # the first line has said what the coordinator waits for
        rows = [row | {"detail": ""} if row["name"] == "coordinator" else row for row in seen["services"]]
        print_table(TITLES, list(map(_cells, rows)), right=("pid", "port", "restarts", "memory"))


def _state_text(state: str, detail: str) -> str:
    if not detail or state == "ready":
        return state
    return detail if detail.startswith(state) else f"{state}: {detail}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    layers = row.get("layers")
    memory_bytes = row.get("memory_bytes")
    return (
        row["name"],
        _text(row.get("pid")),
        _text(row.get("port")),
        _state_text(row["state"], row["detail"]),
        _text(row.get("restarts")),
        _text(row.get("machine")),
        f"{layers[0]} to {layers[1] - 1}" if layers else "",
        f"{_text(row.get('executor'))} {_text(row.get('weights'))}".strip(),
        f"{memory_bytes / 1e6:.0f} MB" if memory_bytes else "",
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)
