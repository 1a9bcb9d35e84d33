"""`noodle init`: prepares a folder for `docker compose up`: .env, secrets, and what to do next.

Safe to run again: secrets and lines that others wrote stay.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from noodle import __version__
from noodle.errors import ConfigurationError
from services.cli.project import secret_files
from services.cli.project.join_line import Join, decode, encode
from services.cli.project.machine_settings import GPU_FILE, MODELS_FOLDER, InitOptions, settings
from services.cli.project.project import (
    COMPOSE_NAME,
    ENV_NAME,
    SECRETS_NAME,
    Project,
    read_values,
    require_project,
    with_values,
)

ROLES_IN_WORDS = {"single": "a whole cluster on one host", "a": "machine A", "b": "machine B"}


def init(options: argparse.Namespace) -> int:
    given = InitOptions(
        machine=options.machine,
        address=options.address,
        peer=options.peer,
        gpu=options.gpu,
        stages=options.stages,
        model=options.model,
        name=options.name,
    )
    # standard input, because other users of this machine may read arguments
    join_text = sys.stdin.read() if options.join == "-" else options.join
    return prepare(Path(options.folder), given, join_text)


def prepare(folder: Path, options: InitOptions, join_text: str | None) -> int:
    """Write what is missing or asked for, and print the next steps; raises ConfigurationError or NotWritable."""
    if not (folder / COMPOSE_NAME).is_file():
        raise ConfigurationError(
            f"{folder.resolve()} holds no {COMPOSE_NAME}.",
            cure="Run this in noodle's folder, or name it with --folder.",
        )
    if join_text is not None:
        options = replace(options, join=decode(join_text))
    path = folder / ENV_NAME
    text = _text_of(path)
    values = settings(options, read_values(text), os.cpu_count() or 1)
    role = values["COMPOSE_PROFILES"]
    found = secret_files.read_secrets(folder)
    if role == "b":
        secrets = _secrets_of_b(found, options.join)
    else:
        secrets = secret_files.completed(found)
        (folder / MODELS_FOLDER).mkdir(exist_ok=True)
        secret_files.assign_to_owner(folder / MODELS_FOLDER, folder)
    names = secret_files.write_secrets(folder, secrets, with_valkey=role != "b")
    secret_files.write_file(path, with_values(text, values), folder)  # last: a folder with .env has its secrets
    print(f"This folder is {ROLES_IN_WORDS[role]}, {values['NOODLE_MACHINE']}.")
    print(f"  {ENV_NAME:<10} what `docker compose up` starts here, with its addresses and ports")
    print(f"  {SECRETS_NAME + '/':<10} {', '.join(names)}: keep them secret")
    print("\n".join(_next_steps(require_project(folder))))
    return 0


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{ENV_NAME} cannot be read: {getattr(error, 'strerror', None) or error}.",
            cure="Run this as the folder's owner, or delete the file to get a new one.",
        ) from error


def _secrets_of_b(found: Mapping[str, str], join: Join | None) -> dict[str, str]:
    """Return A's secrets; raises ConfigurationError if they are missing, or differ from those that B has."""
    if join is None:
        missing = [name for name in secret_files.SECRETS_OF_B if name not in found]
        if missing:
            raise ConfigurationError(
                f"{SECRETS_NAME}/{missing[0]} is missing.",
                cure="Give the join line again (--join ...); `noodle init` on machine A prints it.",
            )
        return {name: found[name] for name in secret_files.SECRETS_OF_B}
    given = {secret_files.CLUSTER_TOKEN: join.cluster_token, secret_files.VALKEY_PASSWORD: join.valkey_password}
    for name, value in given.items():
        if found.get(name, value) != value:
            raise ConfigurationError(
                f"{SECRETS_NAME}/{name} is from another cluster than the join line.",
                cure=f"To join the new cluster, delete {SECRETS_NAME}/ here first; otherwise leave --join out.",
            )
    return given


def join_of(project: Project) -> Join:
    return Join(
        noodle_version=__version__,
        machine=project.machine,
        address=project.lan_address,
        coordinator_port=project.port("NOODLE_COORDINATOR_PORT"),
        valkey_port=project.port("NOODLE_VALKEY_PORT"),
        peer_address=project.peer_address,
        cluster_token=project.secret(secret_files.CLUSTER_TOKEN),
        valkey_password=project.secret(secret_files.VALKEY_PASSWORD),
    )


def _next_steps(project: Project) -> list[str]:
    start = "Next: docker compose up --detach --build"
    if project.role == "b":
        return [start, f"It computes for the coordinator {project.coordinator_url}, and may start before it."]
    url = f"http://127.0.0.1:{project.port('NOODLE_COORDINATOR_PORT')}"
    grafana = f"http://127.0.0.1:{project.port('NOODLE_GRAFANA_PORT')}"
    lines = [
        start,
        f"Then: curl {url}/health    answers `starting`, later `ready`",
        f"      {url}/v1             is the URL for clients; their key is in {SECRETS_NAME}/api_key",
        f"      {grafana}                is Grafana: user admin, password in {SECRETS_NAME}/grafana_password",
    ]
    if GPU_FILE in project.compose_files:
        lines.append("Stage 0 computes on the NVIDIA card (docker-compose.gpu.yml).")
    if project.role == "a":
        return [
            *lines,
            f"On machine B ({project.peer_address}), in its copy of this folder; the line holds secrets:",
            f"      docker compose run --rm init --machine b --join {encode(join_of(project))}",
        ]
    return [
        *lines,
        "For two machines: `init --machine a --address 192.168.1.101 --peer 192.168.1.102` in another folder.",
    ]
