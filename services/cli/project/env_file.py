"""The .env file of a project folder as text: which values it has, and how some are changed while all else stays.

Knows the format (NAME=value lines, as `docker compose` reads them), not what the names mean. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

HEAD = """\
# What this machine runs, read by `docker compose`. `noodle init` wrote it; run again, it keeps what others wrote here.
# .env.example lists every variable that may stand in this file.
"""


def read_values(text: str) -> dict[str, str]:
    """Names and values; a later line wins, quotes around a value do not belong to it."""
    values = {}
    for line in text.splitlines():
        if (name := _name_in(line)) is not None:
            value = line.partition("=")[2].strip()
            if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            else:
                value = value.partition(" #")[0].rstrip()
            values[name] = value
    return values


def with_values(text: str, values: Mapping[str, str]) -> str:
    """The text with these values: in their old places where they have one, else at the end; other lines as they are."""
    left = dict(values)
    lines = []
    for line in (text or HEAD).splitlines():
        name = _name_in(line)
        if name in values:
            if name in left:
                lines.append(f"{name}={left.pop(name)}")
            continue  # a name that stands twice would hide the first one
        lines.append(line)
    return "\n".join([*lines, *(f"{name}={value}" for name, value in left.items())]) + "\n"


def _name_in(line: str) -> str | None:
    name, equals, _ = line.strip().removeprefix("export ").strip().partition("=")
    return name.strip() if equals and not name.startswith("#") else None
