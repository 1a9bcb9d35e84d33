"""The API keys of clients, as a variable or file lists them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from noodle.errors import ConfigurationError

MAXIMUM_API_KEYS = 64  # API keys of a coordinator; each is a label of metrics
KEY_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
KEY = re.compile(r"[ -~]+")  # printable ASCII
RESERVED_KEY_NAMES = ("cluster", "loopback")  # names of clients without a key in logs and metrics


@dataclass(frozen=True)
class ApiKey:
    """A key and its name; logs and metrics show only the name."""

    name: str
    key: str = field(repr=False)


def read_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Read keys separated by commas or lines, each `key` or `name:key`; raises ConfigurationError."""
    keys: list[ApiKey] = []
    for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        name, colon, key = part.partition(":")
        if not colon:
            name, key = f"key-{len(keys) + 1}", part
        if not KEY_NAME.fullmatch(name) or name in RESERVED_KEY_NAMES or not KEY.fullmatch(key):
            raise ConfigurationError(
                f"Key {len(keys) + 1} of NOODLE_API_KEY is malformed.",
                cure="Write key or name:key; names have letters, digits, - and _, 32 at most, keys no spaces.",
            )
        if any(name == other.name or key == other.key for other in keys):
            raise ConfigurationError(
                f"Key {len(keys) + 1} of NOODLE_API_KEY repeats the name or the key of an earlier one.",
                cure="Give each key a name of its own.",
            )
        keys.append(ApiKey(name, key))
    if len(keys) > MAXIMUM_API_KEYS:
        raise ConfigurationError(
            f"NOODLE_API_KEY lists {len(keys)} keys, at most {MAXIMUM_API_KEYS} are accepted.",
            cure="Let some clients share one.",
        )
    return tuple(keys)
