"""Random JSON for parsers, which must refuse it cleanly or accept it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4, 17, 1 << 31, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), -(1 << 64),
    10**30, -(10**200),
    0.0, -0.0, 0.5, 1.0, 1.5, 2.0, 100.0, -1.5, 1e300, -1e300, 5e-324, "", "a", "user", "tool", "text", "\u0000", "😀",
    "x" * 2000, "noodle", "auto", "none", [], {}, [[]], [1, 2], ["a"], ["a", ""], [["a"]], [1, "a"], [True],
    [1.5], [None], [{}], {"type": "text"}, {"type": "text", "text": "hi"},
    {"include_usage": True}, {"role": "user", "content": "hi"},
]  # fmt: skip


def random_value(generator: random.Random, depth: int = 3) -> Any:
    """Return any JSON value, most often one that resembles valid input."""
    choice = generator.random()
    if depth and choice < 0.15:
        return [random_value(generator, depth - 1) for _ in range(generator.randrange(4))]
    if depth and choice < 0.3:
        names = ["role", "content", "type", "text", "name", "include_usage", "stop", "x"]
        return {generator.choice(names): random_value(generator, depth - 1) for _ in range(generator.randrange(4))}
    return generator.choice(SCALARS)


def random_body(generator: random.Random, valid: dict[str, Any], names: Sequence[str]) -> bytes:
    """Return a valid body with a few fields changed, added or removed, sometimes with corrupted bytes."""
    body = dict(valid)
    for _ in range(generator.randrange(1, 4)):
        if generator.random() < 0.15 and body:
            body.pop(generator.choice(sorted(body)))
        else:
            body[generator.choice(names)] = random_value(generator)
    encoded = bytearray(json.dumps(body).encode())
    if generator.random() < 0.2:
        for _ in range(generator.randrange(1, 4)):
            encoded[generator.randrange(len(encoded))] = generator.randrange(256)
        del encoded[generator.randrange(1, len(encoded) + 1) :]
    return bytes(encoded)
