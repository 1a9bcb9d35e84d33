"""What /generate, /generate_stream and /tokenize take and answer, as JSON Schema for /openapi.json."""

from __future__ import annotations

from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api.generate_format import MAXIMUM_STOP_STRINGS, MAXIMUM_TEMPERATURE, NEUTRAL
from services.coordinator.api.json_schema import (
    BOOLEAN,
    COUNT,
    INTEGER,
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
from services.coordinator.api.openai_schemas import (
    CACHE_SALT,
    NEW_TOKENS,
    PRIORITY,
    RESUME_SECONDS,
    SEED,
    TEXT_PROMPT,
    TIMEOUT_SECONDS,
    TOKEN_IDS,
    TOP_P,
    stop_strings,
)
from services.coordinator.engine.parameters import MAXIMUM_TOP_K

PARAMETERS = asked(
    {},
    {
        "max_new_tokens": NEW_TOKENS,
        "temperature": number(0, MAXIMUM_TEMPERATURE),
        "top_p": TOP_P,
        "top_k": integer(-1, MAXIMUM_TOP_K),
        "do_sample": BOOLEAN,
        "seed": SEED,
        "stop": stop_strings(MAXIMUM_STOP_STRINGS),
        "ignore_eos": BOOLEAN,
        "priority": PRIORITY,
        "cache_salt": CACHE_SALT,
        "resume_seconds": RESUME_SECONDS,
        "timeout_seconds": TIMEOUT_SECONDS,
        "details": BOOLEAN,
        "decoder_input_details": BOOLEAN,
        "top_n_tokens": integer(0, MAXIMUM_TOP_LOGPROBS),
        "return_full_text": BOOLEAN,
    },
    NEUTRAL,
)
GENERATE_REQUEST = asked({"inputs": either(TEXT_PROMPT, TOKEN_IDS)}, {"parameters": PARAMETERS}, {})

TOKEN = always({"id": COUNT, "text": STRING, "special": BOOLEAN}, {"logprob": nullable(NUMBER)})
PROMPT_TOKEN = always({"id": COUNT, "text": STRING, "logprob": nullable(NUMBER)})
COUNTS = {
    "finish_reason": one_of("length", "eos_token", "stop_sequence"),
    "generated_tokens": COUNT,
    "prompt_tokens": COUNT,
    "seed": INTEGER,
}
TOKEN_EVENT = always(
    {"index": COUNT, "token": TOKEN, "generated_text": nullable(STRING), "details": nullable(always(COUNTS))},
    {"top_tokens": array(TOKEN)},
)
GENERATE_ANSWER = always(
    {
        "generated_text": STRING,
        "details": always(
            {**COUNTS, "tokens": array(TOKEN)},
            {
                "prefill": array(PROMPT_TOKEN),
                "prompt_token_ids": array(COUNT),
                "top_tokens": array(array(TOKEN)),
            },
        ),
    }
)

TOKENIZE_REQUEST = asked({"inputs": STRING}, {"add_special_tokens": BOOLEAN}, {})
TOKENIZE_ANSWER = array(always({"id": COUNT, "text": STRING, "start": COUNT, "stop": COUNT}))
