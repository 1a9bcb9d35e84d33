"""The bodies of /v1/chat/completions, /v1/completions and /v1/models: requests, answers and chunks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from noodle.errors import InvalidRequest
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api.body import Body, JsonObject, Neutral, neutral, shown
from services.coordinator.api.parameters import (
    MAXIMUM_NEW_TOKENS,
    PROMPT_WORDS,
    STOP_TEXT,
    STOP_WORDS,
    TEXT_SCHEMA,
    TOKEN_IDS_SCHEMA,
    GenerationFields,
    NewTokens,
    StopString,
)

MAXIMUM_STOP_STRINGS = 4
MAXIMUM_TEMPERATURE = 2.0

# What OpenAI and the servers that speak its protocol know and noodle does not do.
NEUTRAL: Neutral = {
    **neutral("n best_of repetition_penalty length_penalty typical_p", 1),
    **neutral("presence_penalty frequency_penalty min_p min_tokens", 0),
    **neutral("use_beam_search early_stopping store include_stop_str_in_output", False),
    **neutral("return_token_ids return_tokens_as_token_ids", False),
    **neutral("skip_special_tokens spaces_between_special_tokens", True),
    **neutral("stop_token_ids bad_words", []),
    **neutral("logit_bias", {}),
    **neutral("response_format", {"type": "text"}),
    **neutral("service_tier", "auto", "default"),
    **neutral("allowed_token_ids truncate_prompt_tokens prompt_logprobs structured_outputs"),
    **neutral("guided_json guided_regex guided_choice guided_grammar"),
}


class StreamOptions(Body):
    NEUTRAL: ClassVar[Neutral] = neutral("include_obfuscation continuous_usage_stats", False)

    include_usage: Annotated[bool, Meta(description="Send one more chunk with the numbers of tokens.")] = False


class OpenAIFields(GenerationFields, kw_only=True):
    """What both routes honour."""

    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    )

    model: Annotated[str | None, Meta(description="A name that /v1/models lists; absent: the model served.")] = None
    temperature: Annotated[
        float, Meta(ge=0, le=MAXIMUM_TEMPERATURE), Meta(description="0 is greedy, higher values are more random.")
    ] = 1.0
    stop: Annotated[
        StopString | Annotated[list[StopString], Meta(max_length=MAXIMUM_STOP_STRINGS)] | None,
        Meta(description=STOP_TEXT, extra=STOP_WORDS),
    ] = None
    stream: Annotated[bool, Meta(description="Send the answer as server-sent events.")] = False
    stream_options: Annotated[StreamOptions | None, Meta(description="Needs `stream`.")] = None

    @classmethod
    def refuse_first(cls, fields: JsonObject, _where: str) -> None:
        options = fields.get("stream_options")
        if isinstance(options, dict) and options and fields.get("stream", False) in (None, False):
            raise InvalidRequest(
                "'stream_options' is given, but 'stream' is not true.", cure="Set 'stream'.", param="stream_options"
            )


class TextPart(Body):
    type: Literal["text"]
    text: str

    @classmethod
    def refuse_first(cls, fields: JsonObject, where: str) -> None:
        if fields.get("type") != "text":
            raise InvalidRequest(
                f"Invalid value for '{where}type': {shown(fields.get('type'))} content is not supported here.",
                cure='Send {"type": "text", "text": ...}.',
                param=f"{where}type",
            )


class Message(Body, kw_only=True):
    NEUTRAL: ClassVar[Neutral] = {
        **neutral("tool_calls annotations", []),
        **neutral("tool_call_id function_call refusal audio reasoning_content"),
    }
    ROLES: ClassVar[tuple[str, ...]] = ("system", "developer", "user", "assistant")

    role: Annotated[
        Literal["system", "developer", "user", "assistant"], Meta(description="`developer` is read as `system`.")
    ]
    content: Annotated[
        str | list[TextPart],
        Meta(
            description="Text parts are joined, a line each.", extra={"expected": "a string or an array of text parts"}
        ),
    ]
    name: Annotated[str | None, Meta(description="The author, for chat templates that name it.")] = None

    @classmethod
    def refuse_first(cls, fields: JsonObject, where: str) -> None:
        role = fields.get("role")
        if role not in cls.ROLES:
            reason = "Tools are not supported here" if role in ("tool", "function") else f"It is {shown(role)}"
            raise InvalidRequest(
                f"Invalid value for '{where}role': {reason}.", cure=f"Use {', '.join(cls.ROLES)}.", param=f"{where}role"
            )


class ChatBody(OpenAIFields, kw_only=True):
    NEUTRAL: ClassVar[Neutral] = {
        **NEUTRAL,
        **neutral("echo continue_final_message add_special_tokens", False),
        **neutral("add_generation_prompt", True),
        **neutral("tools functions documents", []),
        **neutral("tool_choice function_call", "none", "auto"),  # both mean the same without tools
        **neutral("parallel_tool_calls", True, False),
        **neutral("modalities", ["text"]),
        **neutral("reasoning_effort", "none"),
        **neutral("verbosity", "medium"),
        **neutral("chat_template_kwargs", {}),
        **neutral("audio prediction web_search_options moderation chat_template"),
    }

    max_completion_tokens: Annotated[
        NewTokens | None, Meta(description="Tokens to generate at most; absent: what is left of the context.")
    ] = None
    max_tokens: Annotated[NewTokens | None, Meta(description="The older name of max_completion_tokens.")] = None
    logprobs: Annotated[bool, Meta(description="Report the log-probability of each token.")] = False
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAXIMUM_TOP_LOGPROBS)] | None,
        Meta(description="Report this many of the likeliest tokens at each place; needs `logprobs`."),
    ] = None
    # of Message: they are counted before each of them is read
    messages: Annotated[
        list[Any],
        Meta(min_length=1, extra={"expected": "an array of messages", "item": "message"}),
        Meta(description="The conversation.", extra_json_schema={"items": {"$ref": "#/components/schemas/Message"}}),
    ]


class CompletionBody(OpenAIFields, kw_only=True):
    NEUTRAL: ClassVar[Neutral] = {
        **NEUTRAL,
        **neutral("top_logprobs", 0),  # `logprobs` is the number here
        **neutral("suffix", ""),
        **neutral("add_special_tokens", True),
    }

    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAXIMUM_TOP_LOGPROBS)] | None,
        Meta(description="Report log-probabilities: of each token, and of this many of the likeliest at its place."),
    ] = None
    echo: Annotated[bool, Meta(description="Put the prompt before the answer; with `logprobs` it is scored too.")] = (
        False
    )
    prompt: Annotated[
        str | list[Any],
        Meta(description="A text or token ids, alone or as the one item of a list.", extra=PROMPT_WORDS),
        Meta(
            extra_json_schema={
                "anyOf": [
                    TEXT_SCHEMA,
                    TOKEN_IDS_SCHEMA,
                    {"type": "array", "items": TEXT_SCHEMA, "minItems": 1, "maxItems": 1},
                    {"type": "array", "items": TOKEN_IDS_SCHEMA, "minItems": 1, "maxItems": 1},
                ]
            }
        ),
    ]
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAXIMUM_NEW_TOKENS)] | None,
        Meta(description="Tokens to generate at most, 16 if absent; 0 with `echo` scores the prompt alone."),
    ] = None


class AnswerBody(Struct, kw_only=True):
    """An object of an answer; clients get all of its fields, except those that are UNSET."""


class Usage(AnswerBody, kw_only=True):
    prompt_tokens: int
    completion_tokens: int  # the end-of-text token counts, it was computed
    total_tokens: int


class AnswerHead(AnswerBody, kw_only=True):
    """What all parts of one answer share."""

    id: str
    created: Annotated[int, Meta(description="Unix time.")]
    model: str
    seed: Annotated[int, Meta(description="The seed used; the same request with it gets the same answer.")]


class ChatScore(AnswerBody, kw_only=True):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenScore(ChatScore, kw_only=True):
    top_logprobs: list[ChatScore]


class ChatLogprobs(AnswerBody, kw_only=True):
    content: list[ChatTokenScore]
    refusal: None = None


class CompletionLogprobs(AnswerBody, kw_only=True):
    """Four lists of one length; an item of `top_logprobs` also has the token itself, likely or not."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


Reason = Literal["stop", "length"]


class AnswerMessage(AnswerBody, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(AnswerBody, kw_only=True):
    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason


class ChatAnswer(AnswerHead, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(AnswerBody, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(AnswerBody, kw_only=True):
    index: int = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None


class ChatChunk(AnswerHead, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionChoice(AnswerBody, kw_only=True):
    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None


class CompletionAnswer(AnswerHead, kw_only=True):
    """A whole answer or a chunk of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(AnswerBody, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["noodle"] = "noodle"


class ModelList(AnswerBody, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]
