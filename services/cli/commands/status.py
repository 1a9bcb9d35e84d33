"""`noodle status`: what runs, where and how it does, from the run folder, /health and /proc; changes nothing."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from noodle.config.settings import CommandConfig
from services.cli.client.health import Health, ask_health
from services.cli.client.target import Target, find_target
from services.cli.local.processes import proportional_set_bytes, session_members
from services.cli.local.run_state import ServiceRecord

NOT_RUNNING_EXIT_CODE = 1
SHOWN_OF_A_STAGE = ("machine", "layers", "dtype", "executor", "weights")


def status(config: CommandConfig, url: str | None, *, as_json: bool) -> int:
    """Print it; 0 when a coordinator answers or starts, 1 when nothing runs."""
    target = find_target(config, url, None)
    coordinator = ask_health(target.url, target.token)
    if target.record is None and coordinator.status == "silent":
        if as_json:
            print(msgspec.json.encode({"running": False, "url": target.url}).decode())
        else:
            print(
                f"noodle is not running: nothing answers at {target.url}. Start it with `noodle up` (with Docker: "
                "`docker compose up`), or wait a moment if it was started just now."
            )
        return NOT_RUNNING_EXIT_CODE
    seen = _seen(target, coordinator)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(seen)).decode())
    else:
        _print(seen)
    return 0


def _seen(target: Target, coordinator: Health) -> dict[str, Any]:
    """Everything that is known, as plain values."""
    record = target.record
    rows = [_local_row(service, target.token) for service in record.services] if record else _remote_rows(coordinator)
    layers = _layers(coordinator)
    for row in rows:
        row.update(layers.get(str(row["name"]), {}))
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
    if service.name != "valkey":  # it speaks no HTTP
        health = ask_health(service.port, token)
        row["state"] = health.status
        row["detail"] = health.detail
    return row


def _remote_rows(coordinator: Health) -> list[dict[str, Any]]:
    """The stages as the coordinator of another machine sees them."""
    return [
        {
            "name": f"stage-{stage.get('stage_id')}",
            "state": str(stage.get("phase", "")),
            "detail": str(stage.get("detail", "")),
        }
        for stage in coordinator.answer.get("stages") or []
        if isinstance(stage, dict)
    ]


def _layers(coordinator: Health) -> dict[str, dict[str, Any]]:
    """Machine, layers and how they are computed, of each stage as the coordinator sees it."""
    return {
        f"stage-{stage.get('stage_id')}": {
            name: stage.get(name) for name in ("machine", "layers", "dtype", "executor", "weights")
        }
        for stage in coordinator.answer.get("stages") or []
        if isinstance(stage, dict)
    }


def _print(seen: dict[str, Any]) -> None:
    console = Console(file=sys.stdout)
    head = f"{seen['model'] or 'noodle'} at {seen['url']}: {seen['status']}"
    print(head + (f" ({seen['detail']})" if seen["detail"] not in ("", seen["status"]) else ""))
    for warning in seen["warnings"]:
        print(f"Note: {warning}")
    if seen["pid"]:
        print(f"`noodle up` is {seen['phase']}, pid {seen['pid']}.")
    table = Table(box=None, pad_edge=False)
    for title in ("service", "pid", "port", "state", "restarts", "machine", "layers", "computed by", "memory"):
        table.add_column(title, justify="right" if title in ("pid", "port", "restarts", "memory") else "left")
    for row in seen["services"]:
        layers = row.get("layers")
        memory_bytes = row.get("memory_bytes")
        table.add_row(
            row["name"],
            _shown(row.get("pid")),
            _shown(row.get("port")),
            row["state"] + (f": {row['detail']}" if row["detail"] and row["state"] != "ready" else ""),
            _shown(row.get("restarts")),
            _shown(row.get("machine")),
            f"{layers[0]} to {layers[1] - 1}" if layers else "",
            f"{_shown(row.get('executor'))} {_shown(row.get('weights'))}".strip(),
            f"{memory_bytes / 1e6:.0f} MB" if memory_bytes else "",
        )
    if seen["services"]:
        if not console.is_terminal:
            console.width = 200  # a pipe has no edge to break lines at
        console.print(table)


def _shown(value: object) -> str:
    return "" if value is None else str(value)
