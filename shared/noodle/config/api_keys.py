"""The keys that clients show, as one variable or file lists them; knows no request."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from noodle.errors import ConfigurationError

MAXIMUM_API_KEYS = 64  # each is a label of metrics
KEY_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
RESERVED_KEY_NAMES = ("cluster", "loopback")  # how logs and metrics call those who come without a key


@dataclass(frozen=True)
class ApiKey:
    """What a client shows; its name may stand in logs and metrics, the key never does."""

    name: str
    key: str = field(repr=False)


def read_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Keys with commas or lines between, each as `key` or `name:key`; raises ConfigurationError."""
    keys: list[ApiKey] = []
    for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        name, colon, key = part.partition(":")
        if not colon:
            name, key = f"key-{len(keys) + 1}", part
        if (
            not KEY_NAME.fullmatch(name)
            or name in RESERVED_KEY_NAMES
            or not key
            or not key.isascii()
            or not key.isprintable()
        ):
            raise ConfigurationError(
                f"Key {len(keys) + 1} of NOODLE_API_KEY can not be read.",
                cure="Write key or name:key; names have letters, digits, - and _, 32 at most, keys no spaces.",
            )
        if any(name == other.name or key == other.key for other in keys):
            raise ConfigurationError(
                f"Key {len(keys) + 1} of NOODLE_API_KEY has the name or the key of one before it.",
                cure="Give each key a name of its own.",
            )
        keys.append(ApiKey(name, key))
    if len(keys) > MAXIMUM_API_KEYS:
        raise ConfigurationError(
            f"NOODLE_API_KEY lists {len(keys)} keys, {MAXIMUM_API_KEYS} are taken.", cure="Let some clients share one."
        )
    return tuple(keys)
