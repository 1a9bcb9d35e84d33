"""The join line: what machine B needs to know about machine A, as one text that a person copies.

It holds two secrets, so anyone who has it can join the cluster.
"""

from __future__ import annotations

import base64
import binascii

import msgspec
from msgspec import Struct

from noodle import __version__
from noodle.errors import ConfigurationError

ASK_AGAIN = "Copy the whole line that `noodle init` printed on machine A. Run it again to see it again."


class Join(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What machine B knows about machine A."""

    noodle_version: str
    machine: str  # A's name
    address: str
    coordinator_port: int
    valkey_port: int
    peer_address: str  # B's address as A knows it
    cluster_token: str
    valkey_password: str

    @property
    def coordinator_url(self) -> str:
        """The coordinator's URL: B gets weights from it."""
        return f"http://{self.address}:{self.coordinator_port}"

    @property
    def valkey_url(self) -> str:
        """Valkey's URL: B gets plans and steps from it."""
        return f"redis://noodle@{self.address}:{self.valkey_port}"


def encode(join: Join) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(join)).decode().rstrip("=")


def decode(text: str) -> Join:
    """Read the text after --join; raises ConfigurationError if it is cut off or from another version of noodle."""
    text = "".join(text.split())
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        version = msgspec.json.decode(data, type=_Version).noodle_version
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise ConfigurationError("The text after --join is not a whole join line.", cure=ASK_AGAIN) from error
    if version != __version__:
        raise ConfigurationError(
            f"The join line is from noodle {version}, and this is noodle {__version__}.",
            cure="Bring both machines to the same version, then take a new join line from machine A.",
        )
    try:
        return msgspec.json.decode(data, type=Join)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"The join line is damaged: {error}.", cure=ASK_AGAIN) from error


class _Version(Struct, frozen=True):
    noodle_version: str
