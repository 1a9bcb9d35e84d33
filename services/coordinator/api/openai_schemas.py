"""What /v1 takes and answers, as JSON Schema for /openapi.json; made from the tables that requests are checked by."""

from __future__ import annotations

from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api.json_schema import (
    ANYTHING,
    BOOLEAN,
    COUNT,
    INTEGER,
    NULL,
    NUMBER,
    STRING,
    always,
    array,
    asked,
    either,
    integer,
    nullable,
    number,
    one_of,
)
from services.coordinator.api.openai_fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, HARMLESS, STREAM_OPTIONS_NEUTRAL
from services.coordinator.api.openai_messages import MESSAGE_NEUTRAL, ROLES
from services.coordinator.api.openai_request import MAXIMUM_STOP_STRINGS, MAXIMUM_TEMPERATURE
from services.coordinator.api.request_body import JsonObject
from services.coordinator.engine.parameters import (
    MAXIMUM_NEW_TOKENS,
    MAXIMUM_PRIORITY,
    MAXIMUM_RESUME_SECONDS,
    MAXIMUM_SALT_CHARACTERS,
    MAXIMUM_STOP_CHARACTERS,
    MAXIMUM_TIMEOUT_SECONDS,
    MAXIMUM_TOP_K,
)

NEW_TOKENS = integer(1, MAXIMUM_NEW_TOKENS)
STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAXIMUM_STOP_CHARACTERS}
TOP_P = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
PRIORITY = integer(-MAXIMUM_PRIORITY, MAXIMUM_PRIORITY)
CACHE_SALT = {"type": "string", "maxLength": MAXIMUM_SALT_CHARACTERS}
RESUME_SECONDS = number(0, MAXIMUM_RESUME_SECONDS)
TIMEOUT_SECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": MAXIMUM_TIMEOUT_SECONDS}
SEED = integer(-(1 << 63), (1 << 63) - 1)


def stop_strings(maximum: int) -> JsonObject:
    """One string or several."""
    return either(STOP_STRING, array(STOP_STRING, maxItems=maximum))


HONOURED = {
    "model": STRING,
    "max_tokens": NEW_TOKENS,
    "temperature": number(0, MAXIMUM_TEMPERATURE),
    "top_p": TOP_P,
    "top_k": integer(-1, MAXIMUM_TOP_K),
    "seed": SEED,
    "stop": stop_strings(MAXIMUM_STOP_STRINGS),
    "stream": BOOLEAN,
    "stream_options": asked({}, {"include_usage": BOOLEAN}, STREAM_OPTIONS_NEUTRAL),
    "ignore_eos": BOOLEAN,
    "priority": PRIORITY,
    "cache_salt": CACHE_SALT,
    "resume_seconds": RESUME_SECONDS,
    "timeout_seconds": TIMEOUT_SECONDS,
    **dict.fromkeys(sorted(HARMLESS), ANYTHING),
}
TEXT_PART = always({"type": one_of("text"), "text": STRING})
MESSAGE = asked(
    {"role": one_of(*ROLES), "content": either(STRING, array(TEXT_PART))}, {"name": STRING}, MESSAGE_NEUTRAL
)
CHAT_REQUEST = asked(
    {"messages": array(MESSAGE, minItems=1)},
    {
        **HONOURED,
        "max_completion_tokens": NEW_TOKENS,
        "logprobs": BOOLEAN,
        "top_logprobs": integer(0, MAXIMUM_TOP_LOGPROBS),
    },
    CHAT_NEUTRAL,
)
TOKEN_IDS = array(COUNT, minItems=1)
TEXT_PROMPT = {"type": "string", "minLength": 1}
COMPLETION_REQUEST = asked(
    {
        "prompt": either(
            TEXT_PROMPT,
            TOKEN_IDS,
            array(TEXT_PROMPT, minItems=1, maxItems=1),
            array(TOKEN_IDS, minItems=1, maxItems=1),
        )
    },
    {
        **HONOURED,
        "max_tokens": integer(0, MAXIMUM_NEW_TOKENS),
        "echo": BOOLEAN,
        "logprobs": integer(0, MAXIMUM_TOP_LOGPROBS),
    },
    COMPLETION_NEUTRAL,
)

USAGE = always({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
FINISH_REASON = one_of("stop", "length")
HEAD = {"id": STRING, "created": COUNT, "model": STRING, "seed": INTEGER}
TOKEN_SCORE = {"token": STRING, "logprob": NUMBER, "bytes": array(integer(0, 255))}
CHAT_LOGPROBS = always(
    {
        "content": array(always({**TOKEN_SCORE, "top_logprobs": array(always(TOKEN_SCORE))})),
        "refusal": NULL,
    }
)
CHAT_ANSWER = always(
    {
        **HEAD,
        "object": one_of("chat.completion"),
        "choices": array(
            always(
                {
                    "index": COUNT,
                    "message": always({"role": one_of("assistant"), "content": STRING, "refusal": NULL}),
                    "logprobs": nullable(CHAT_LOGPROBS),
                    "finish_reason": FINISH_REASON,
                }
            ),
            minItems=1,
            maxItems=1,
        ),
        "usage": USAGE,
    }
)
COMPLETION_LOGPROBS = always(
    {
        "tokens": array(STRING),
        "token_logprobs": array(nullable(NUMBER)),
        "top_logprobs": array(nullable({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": array(COUNT),
    }
)
COMPLETION_ANSWER = always(
    {
        **HEAD,
        "object": one_of("text_completion"),
        "choices": array(
            always(
                {
                    "index": COUNT,
                    "text": STRING,
                    "logprobs": nullable(COMPLETION_LOGPROBS),
                    "finish_reason": FINISH_REASON,
                }
            ),
            minItems=1,
            maxItems=1,
        ),
        "usage": USAGE,
    }
)
CHAT_CHUNK = always(
    {
        **HEAD,
        "object": one_of("chat.completion.chunk"),
        "choices": array(
            always(
                {
                    "index": COUNT,
                    "delta": always({}, {"role": one_of("assistant"), "content": STRING}),
                    "logprobs": nullable(CHAT_LOGPROBS),
                    "finish_reason": nullable(FINISH_REASON),
                }
            ),
            maxItems=1,
        ),
    },
    {"usage": nullable(USAGE)},
)
COMPLETION_CHUNK = always(
    {
        **HEAD,
        "object": one_of("text_completion"),
        "choices": array(
            always(
                {
                    "index": COUNT,
                    "text": STRING,
                    "logprobs": nullable(COMPLETION_LOGPROBS),
                    "finish_reason": nullable(FINISH_REASON),
                }
            ),
            maxItems=1,
        ),
    },
    {"usage": nullable(USAGE)},
)
MODEL = always({"id": STRING, "object": one_of("model"), "created": COUNT, "owned_by": STRING})
MODEL_LIST = always({"object": one_of("list"), "data": array(MODEL, minItems=1)})
