"""`noodle init`: makes a folder ready for `docker compose up`: .env, secrets, and what to do next; starts nothing.

What .env says is decided in machine_settings.py. Safe to run again: secrets and the operator's own lines stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from noodle import __version__
from noodle.errors import ConfigurationError
from services.cli.project.env_file import read_values, with_values
from services.cli.project.join_line import Join, decode, encode
from services.cli.project.machine_settings import COMPOSE_FILE, GPU_FILE, MODELS_FOLDER, Wish, settings
from services.cli.project.secret_files import (
    CLUSTER_TOKEN,
    FILE_MODE,
    FOLDER_NAME,
    OF_MACHINE_A,
    VALKEY_PASSWORD,
    Owner,
    completed,
    read_secrets,
    write_file,
    write_secrets,
)

ENV_NAME = ".env"
OF_MACHINE_B = (CLUSTER_TOKEN, VALKEY_PASSWORD)


def init(folder: Path, wish: Wish, join_text: str | None) -> int:
    """Write what is missing or asked for anew, and print what comes next; raises ConfigurationError or NotWritable."""
    if not (folder / COMPOSE_FILE).is_file():
        raise ConfigurationError(
            f"{folder.resolve()} holds no {COMPOSE_FILE}.",
            cure="Run this in noodle's folder, or name it with --folder.",
        )
    if join_text is not None:
        wish = replace(wish, join=decode(join_text))
    path = folder / ENV_NAME
    text = _text_of(path)
    values = settings(wish, read_values(text), os.cpu_count() or 1)
    kind = values["COMPOSE_PROFILES"]
    found = read_secrets(folder)
    secrets = _of_machine_b(found, wish.join) if kind == "b" else completed(found, OF_MACHINE_A)
    owner = Owner.of(folder)
    if kind != "b":
        (folder / MODELS_FOLDER).mkdir(exist_ok=True)
        owner.give(folder / MODELS_FOLDER)
    names = write_secrets(folder, secrets, owner, with_valkey=kind != "b")
    write_file(path, with_values(text, values), owner, FILE_MODE)  # last: whoever has it has the secrets
    print(f"This folder is {_in_words(kind)}, {values['NOODLE_MACHINE']}.")
    print(f"  {ENV_NAME:<10} what `docker compose up` starts here, on which addresses and ports")
    print(f"  {FOLDER_NAME + '/':<10} {', '.join(names)}: give them to nobody")
    print(_next_steps(kind, values, secrets))
    return 0


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{ENV_NAME} can not be read: {getattr(error, 'strerror', None) or error}.",
            cure="Run this as the folder's owner, or delete the file so that a new one is made.",
        ) from error


def _of_machine_b(found: Mapping[str, str], join: Join | None) -> dict[str, str]:
    """B's secrets are A's; raises ConfigurationError when they are missing, or others than those that B has."""
    if join is None:
        missing = [name for name in OF_MACHINE_B if name not in found]
        if missing:
            raise ConfigurationError(
                f"{FOLDER_NAME}/{missing[0]} is missing.",
                cure="Give the join line again (--join ...); `noodle init` on machine A prints it.",
            )
        return {name: found[name] for name in OF_MACHINE_B}
    given = {CLUSTER_TOKEN: join.cluster_token, VALKEY_PASSWORD: join.valkey_password}
    for name, value in given.items():
        if found.get(name, value) != value:
            raise ConfigurationError(
                f"{FOLDER_NAME}/{name} is of another cluster than the join line.",
                cure=f"To join the new one delete {FOLDER_NAME}/ here first; else leave --join out.",
            )
    return given


def _in_words(kind: str) -> str:
    return {"single": "a whole noodle on one host", "a": "machine A", "b": "machine B"}[kind]


def _next_steps(kind: str, values: Mapping[str, str], secrets: Mapping[str, str]) -> str:
    start = "Next: docker compose up --detach --build"
    if kind == "b":
        return (
            f"{start}\n"
            f"It computes for the coordinator {values['NOODLE_COORDINATOR_URL']}, and may be started before it."
        )
    url = f"http://127.0.0.1:{values['NOODLE_COORDINATOR_PORT']}"
    grafana = f"http://127.0.0.1:{values['NOODLE_GRAFANA_PORT']}"
    lines = [
        start,
        f"Then: curl {url}/health    says `starting`, and `ready` in the end",
        f"      {url}/v1             for clients; their key is in {FOLDER_NAME}/api_key",
        f"      {grafana}                Grafana: admin, {FOLDER_NAME}/grafana_password",
    ]
    if GPU_FILE in values["COMPOSE_FILE"]:
        lines.append("Stage 0 computes on the NVIDIA card (docker-compose.gpu.yml).")
    if kind == "a":
        join = Join(
            noodle_version=__version__,
            machine=values["NOODLE_MACHINE"],
            address=values["NOODLE_LAN_ADDRESS"],
            coordinator_port=int(values["NOODLE_COORDINATOR_PORT"]),
            valkey_port=int(values["NOODLE_VALKEY_PORT"]),
            peer_address=values["NOODLE_PEER_ADDRESS"],
            cluster_token=secrets[CLUSTER_TOKEN],
            valkey_password=secrets[VALKEY_PASSWORD],
        )
        lines += [
            f"On machine B ({values['NOODLE_PEER_ADDRESS']}), in its copy of this folder; the line holds secrets:",
            f"      docker compose run --rm init --machine b --join {encode(join)}",
        ]
    else:
        lines.append("Two machines: `init --machine a --address 192.168.1.101 --peer 192.168.1.102` in another folder.")
    return "\n".join(lines)
