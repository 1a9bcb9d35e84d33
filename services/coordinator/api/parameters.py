"""The fields by which every form of request says how its tokens are generated; a new parameter begins here."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from msgspec import Meta

from services.coordinator.api.body import Body

MAXIMUM_NEW_TOKENS = (1 << 31) - 1  # the context is the true limit; this one keeps absurd numbers off the wire
MAXIMUM_TOP_K = (1 << 31) - 1
MAXIMUM_PRIORITY = 1000
MAXIMUM_SALT_CHARACTERS = 256
MAXIMUM_RESUME_SECONDS = 300
MAXIMUM_TIMEOUT_SECONDS = 86_400
MAXIMUM_STOP_CHARACTERS = 1000  # each of the stop strings
DRAWN_SEED_BITS = 53  # what a client that reads numbers as doubles can send back exactly

NewTokens = Annotated[int, Meta(ge=1, le=MAXIMUM_NEW_TOKENS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAXIMUM_STOP_CHARACTERS)]
STOP_WORDS = {"expected": "a string or an array of strings", "item": "stop string"}
STOP_TEXT = "The answer ends before the first of these strings."
TOP_P_BOUNDS = "a number above 0 and at most 1 (temperature 0 is greedy)"
TIMEOUT_BOUNDS = f"a number above 0 and at most {MAXIMUM_TIMEOUT_SECONDS}, or none at all"

TEXT_SCHEMA = {"type": "string", "minLength": 1}
TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT_WORDS = {"expected": "a string or an array of token ids"}


class GenerationFields(Body, kw_only=True):
    """Fields that all forms read in the same way; a Request has them under the same names."""

    seed: Annotated[
        Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None,
        Meta(description="Repeats a sampled answer. Without one a seed is drawn; every answer carries the seed used."),
    ] = None
    top_p: Annotated[
        float,
        Meta(gt=0, le=1, extra={"bounds": TOP_P_BOUNDS}),
        Meta(description="Sample from the likeliest tokens whose probabilities add up to this."),
    ] = 1.0
    top_k: Annotated[
        int,
        Meta(ge=-1, le=MAXIMUM_TOP_K),
        Meta(description="Sample from this many of the likeliest tokens; 0 and -1 mean all."),
    ] = 0
    ignore_eos: Annotated[bool, Meta(description="Generate on after the end-of-text token.")] = False
    cache_salt: Annotated[
        str,
        Meta(max_length=MAXIMUM_SALT_CHARACTERS),
        Meta(description="Only requests with the same salt share KV rows of a common prefix."),
    ] = ""
    resume_seconds: Annotated[
        float,
        Meta(ge=0, le=MAXIMUM_RESUME_SECONDS),
        Meta(description="How long the request runs on without a reader, to be resumed under /v1/requests."),
    ] = 0.0
    timeout_seconds: Annotated[
        Annotated[float, Meta(gt=0, le=MAXIMUM_TIMEOUT_SECONDS, extra={"bounds": TIMEOUT_BOUNDS})] | None,
        Meta(description="Ends the request this long after its arrival."),
    ] = None
    priority: Annotated[
        int,
        Meta(ge=-MAXIMUM_PRIORITY, le=MAXIMUM_PRIORITY),
        Meta(description="Requests with a lower number are served first."),
    ] = 0

    def shared_values(self) -> dict[str, Any]:
        """The Request's fields that are read here; a seed is drawn if none is given, to repeat the answer."""
        values = {name: getattr(self, name) for name in GenerationFields.__struct_fields__}
        return {
            **values,
            "seed": secrets.randbits(DRAWN_SEED_BITS) if self.seed is None else self.seed,
            "top_k": max(self.top_k, 0),
            "timeout_seconds": self.timeout_seconds or 0.0,
        }


def stop_strings(value: str | list[str] | None) -> tuple[str, ...]:
    """The different stop strings of a request."""
    return tuple(dict.fromkeys([value] if isinstance(value, str) else value or ()))
