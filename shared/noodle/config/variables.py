"""How one environment variable is declared and read: its name, default, check and remark."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from noodle.cluster.plan import MINIMUM_SESSION_TOKENS
from noodle.config.addresses import Address
from noodle.model.formats import QUALITIES

MAXIMUM_CONTEXT_TOKENS = 1 << 24  # largest NOODLE_CONTEXT_LENGTH, in tokens
MAXIMUM_WAIT_SECONDS = 86_400  # largest value of a variable in seconds

Value = TypeVar("Value")


@dataclass(frozen=True)
class Variable:
    """One environment variable; a secret also has NAME_FILE, which names a file that holds it."""

    name: str
    default: str  # as text
    parse: Callable[[str], Any]  # raises ValueError with the values that are accepted
    remark: str  # with the unit; .env.example and error messages show it
    file_remark: str = ""  # of a secret: what its NAME_FILE holds

    @property
    def file_variables(self) -> tuple[Variable, ...]:
        """NAME_FILE of a secret, nothing otherwise."""
        return (Variable(f"{self.name}_FILE", "", str, self.file_remark),) if self.file_remark else ()


def variable(name: str, default: str, parse: Callable[[str], Value], remark: str, *, file_remark: str = "") -> Value:
    """Declare a field of a configuration class that is read from a variable, a secret also from its NAME_FILE."""
    declared = Variable(name, default, parse, remark, file_remark)
    return field(default_factory=lambda: parse(default), metadata={"variable": declared})


# Parsers: each turns the text of a variable into its value.


def path(text: str) -> Path:
    return Path(text).expanduser()


def flag(text: str) -> bool:
    return choice("on", "off")(text) == "on"


def choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return text

    return parse


def whole(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text) or not minimum <= int(text) <= maximum:
            raise ValueError(f"a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


port = whole(1, 65535)


def quality(text: str) -> str:
    if text not in QUALITIES:
        raise ValueError(f"one of {', '.join(QUALITIES)}; name a smaller format of weights in NOODLE_WEIGHTS")
    return text


def context_length(text: str) -> int | None:
    if text == "0":
        return None
    try:
        return whole(MINIMUM_SESSION_TOKENS, MAXIMUM_CONTEXT_TOKENS)(text)
    except ValueError as error:
        least = f"{MINIMUM_SESSION_TOKENS} (a short prompt and its answer)"
        raise ValueError(f"0 or a whole number from {least} to {MAXIMUM_CONTEXT_TOKENS}") from error


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= MAXIMUM_WAIT_SECONDS:
        raise ValueError(f"seconds, more than 0 and at most {MAXIMUM_WAIT_SECONDS}")
    return number


def address(text: str) -> Address:
    host, _, number = text.rpartition(":")
    if not host or not number.isdigit() or not 0 < int(number) < 65536:
        raise ValueError("host:port, as 127.0.0.1:8080")
    return Address(host.strip("[]"), int(number))


def ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text)) if text else text
    except ValueError as error:
        raise ValueError("an IPv4 address, as 192.168.1.101") from error


def memory_size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*[mg]", text):
        raise ValueError("megabytes or gigabytes, as 512m or 8g")
    return text


def url(text: str) -> str:
    if not text:
        return text
    parts = urlsplit(text)
    if parts.scheme not in ("http", "redis") or not parts.hostname or not parts.port:
        raise ValueError("a URL with a port, as http://192.168.1.102:8081")
    return text.rstrip("/")


def origins(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in found:
        parts = urlsplit(origin)
        is_bare = parts.scheme in ("http", "https") and parts.hostname and origin == f"{parts.scheme}://{parts.netloc}"
        if origin != "*" and not is_bare:
            raise ValueError("origins as http://192.168.1.101:3000, without a path, or *")
    return found


def layer_split(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]+", part) and int(part) > 0 for part in parts):
        raise ValueError("layers per stage, each at least 1, as 10,2")
    return tuple(map(int, parts))
