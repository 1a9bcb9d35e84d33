"""What machine B needs to know of machine A, as one text that a person copies: address, ports and two secrets.

Whoever has the text can join the cluster. Pure.
"""

from __future__ import annotations

import base64
import binascii

import msgspec
from msgspec import Struct

from noodle import __version__
from noodle.errors import ConfigurationError

ASK_AGAIN = "Copy the whole line that `noodle init` printed on machine A; it prints it again when it is run again."


class Join(Struct, frozen=True, forbid_unknown_fields=True):
    """Machine A as B must know it."""

    noodle_version: str
    machine: str  # A's name
    address: str
    coordinator_port: int
    valkey_port: int
    peer_address: str  # what A knows as B's address
    cluster_token: str
    valkey_password: str

    @property
    def coordinator_url(self) -> str:
        """Where B finds weights, and commands their coordinator."""
        return f"http://{self.address}:{self.coordinator_port}"

    @property
    def valkey_url(self) -> str:
        """Where B finds plans and steps."""
        return f"redis://noodle@{self.address}:{self.valkey_port}"


def encode(join: Join) -> str:
    """The text after --join."""
    return base64.urlsafe_b64encode(msgspec.json.encode(join)).decode().rstrip("=")


def decode(text: str) -> Join:
    """Read the text after --join; raises ConfigurationError for one that is cut, or of another version of noodle."""
    text = "".join(text.split())
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        version = msgspec.json.decode(data, type=_Version).noodle_version
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise ConfigurationError(
            "The text after --join is not a join line, or a part of it.", cure=ASK_AGAIN
        ) from error
    if version != __version__:
        raise ConfigurationError(
            f"The join line is of noodle {version}, and this is noodle {__version__}.",
            cure="Bring both machines to the same version first, then take a new join line from machine A.",
        )
    try:
        return msgspec.json.decode(data, type=Join)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"The join line is damaged: {error}.", cure=ASK_AGAIN) from error


class _Version(Struct, frozen=True):
    noodle_version: str
