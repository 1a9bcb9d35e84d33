"""The folder `secrets/` of a project: adds what is missing and keeps what is there.

Only its owner may enter the folder. The files in it are readable by all, because compose mounts them one by one into
containers with other users.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from noodle.cluster.valkey_access import acl_text
from noodle.errors import ConfigurationError, NotWritable
from noodle.folders import write_atomically
from services.cli.project.project import SECRETS_NAME

CLUSTER_TOKEN, VALKEY_PASSWORD, VALKEY_ACL = "cluster_token", "valkey_password", "valkey.acl"
API_KEY, GRAFANA_PASSWORD = "api_key", "grafana_password"
SECRETS_OF_A = (CLUSTER_TOKEN, VALKEY_PASSWORD, API_KEY, GRAFANA_PASSWORD)
SECRETS_OF_B = (CLUSTER_TOKEN, VALKEY_PASSWORD)
SECRET_BYTES = 32
MINIMUM_CHARACTERS = 16  # length of a cluster token that services accept
FOLDER_MODE, FILE_MODE = 0o700, 0o644


def assign_to_owner(path: Path, folder: Path) -> None:
    """Give a path to the owner of the project's folder, if root makes it, as in a container; never on Windows."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        status = folder.stat()
        os.chown(path, status.st_uid, status.st_gid)


def read_secrets(folder: Path) -> dict[str, str]:
    """Return the secrets that exist, by name; an empty file counts as missing. Raises ConfigurationError."""
    found = {}
    for name in SECRETS_OF_A:
        path = folder / SECRETS_NAME / name
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{SECRETS_NAME}/{name} cannot be read: {getattr(error, 'strerror', None) or error}.",
                cure="Run this as the folder's owner, or delete the file to get a new one.",
            ) from error
        if secret and len(secret) < MINIMUM_CHARACTERS:
            raise ConfigurationError(
                f"{SECRETS_NAME}/{name} is shorter than {MINIMUM_CHARACTERS} characters.",
                cure="Delete the file on every machine to get a new one.",
            )
        if secret:
            found[name] = secret
    return found


def completed(found: dict[str, str]) -> dict[str, str]:
    """Return all secrets: those found, and new ones for the rest."""
    return {name: found.get(name) or secrets.token_urlsafe(SECRET_BYTES) for name in SECRETS_OF_A}


def write_secrets(folder: Path, values: dict[str, str], *, with_valkey: bool) -> list[str]:
    """Write the folder, with Valkey's ACL if it runs here; return the names of the files. Raises NotWritable."""
    secrets_folder = folder / SECRETS_NAME
    texts = {name: f"{value}\n" for name, value in values.items()}
    if with_valkey:
        texts[VALKEY_ACL] = acl_text(values[VALKEY_PASSWORD])
    with _writing(secrets_folder):
        secrets_folder.mkdir(exist_ok=True)
        secrets_folder.chmod(FOLDER_MODE)
        assign_to_owner(secrets_folder, folder)
    for name, text in texts.items():
        write_file(secrets_folder / name, text, folder)
    return sorted(texts)


def write_file(path: Path, text: str, folder: Path) -> None:
    """Write a file of a project whole or not at all; if the content is the same, set only mode and owner."""
    with _writing(path):
        if not (path.is_file() and path.read_bytes() == text.encode()):
            write_atomically(path, text.encode())
        path.chmod(FILE_MODE)
        assign_to_owner(path, folder)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritable(
            f"{path} cannot be written ({error.strerror or error}).",
            cure="Run this in noodle's folder as its owner, and check that its disk has room.",
        ) from error
