"""The folder `secrets/` of a project: makes what is missing, keeps what is there; knows no machine and no .env.

The folder is its owner's alone. The files in it can be read by anyone who gets past it: compose mounts them one by one
into containers whose users are other ones.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from noodle.cluster.valkey_access import acl_text
from noodle.errors import ConfigurationError, NotWritable

FOLDER_NAME = "secrets"
CLUSTER_TOKEN, VALKEY_PASSWORD, VALKEY_ACL = "cluster_token", "valkey_password", "valkey.acl"  # names
API_KEY, GRAFANA_PASSWORD = "api_key", "grafana_password"  # a name
OF_MACHINE_A = (CLUSTER_TOKEN, VALKEY_PASSWORD, API_KEY, GRAFANA_PASSWORD)
SECRET_BYTES = 32
MINIMUM_CHARACTERS = 16  # what services ask of the cluster token
FOLDER_MODE, SECRET_MODE, FILE_MODE = 0o700, 0o644, 0o644


@dataclass(frozen=True)
class Owner:
    """To whom files that are made belong: the folder's owner, also when a container's root makes them."""

    user_id: int
    group_id: int

    @classmethod
    def of(cls, folder: Path) -> Owner:
        """Who owns a folder."""
        status = folder.stat()
        return cls(status.st_uid, status.st_gid)

    def give(self, path: Path) -> None:
        """Make a path theirs, where this process may and has to."""
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # not on Windows, where files have no such owner
            os.chown(path, self.user_id, self.group_id)


def read_secrets(folder: Path) -> dict[str, str]:
    """What is there, by name; an empty file is as none. Raises ConfigurationError for one that can not be used."""
    found = {}
    for name in OF_MACHINE_A:
        path = folder / FOLDER_NAME / name
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{FOLDER_NAME}/{name} can not be read: {getattr(error, 'strerror', None) or error}.",
                cure="Run this as the folder's owner, or delete the file so that a new one is made.",
            ) from error
        if secret and len(secret) < MINIMUM_CHARACTERS:
            raise ConfigurationError(
                f"{FOLDER_NAME}/{name} is shorter than {MINIMUM_CHARACTERS} characters.",
                cure="Delete the file so that a new one is made, on every machine.",
            )
        if secret:
            found[name] = secret
    return found


def completed(found: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """These secrets: those that were found, and new ones for the rest."""
    return {name: found.get(name) or secrets.token_urlsafe(SECRET_BYTES) for name in names}


def write_secrets(folder: Path, values: dict[str, str], owner: Owner, *, with_valkey: bool) -> list[str]:
    """Write the folder, and Valkey's ACL where it runs here; gives the names of the files. Raises NotWritable."""
    secrets_folder = folder / FOLDER_NAME
    texts = {name: f"{value}\n" for name, value in values.items()}
    if with_valkey:
        texts[VALKEY_ACL] = acl_text(values[VALKEY_PASSWORD])
    with _writing(secrets_folder):
        secrets_folder.mkdir(exist_ok=True)
        secrets_folder.chmod(FOLDER_MODE)
        owner.give(secrets_folder)
    for name, text in texts.items():
        write_file(secrets_folder / name, text, owner, SECRET_MODE)
    return sorted(texts)


def write_file(path: Path, text: str, owner: Owner, mode: int) -> None:
    """Write a file whole or not at all; one that says the same already is left alone but for its mode and owner."""
    with _writing(path):
        if not (path.is_file() and path.read_bytes() == text.encode()):
            beside = path.with_name(f".{path.name}.new")
            try:
                beside.write_bytes(text.encode())
                beside.replace(path)
            except OSError:
                with contextlib.suppress(OSError):  # the first one is told
                    beside.unlink(missing_ok=True)
                raise
        path.chmod(mode)
        owner.give(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritable(
            f"{path} can not be written ({error.strerror or error}).",
            cure="Run this in noodle's folder as its owner, and see that its disk has room.",
        ) from error
