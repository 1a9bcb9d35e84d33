"""The routes of text-generation-inference: /generate, /generate_stream and /tokenize.

A request without temperature, top_p, top_k and do_sample is greedy; with any of them it samples, at temperature 1 by
default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, NamedTuple

from flask import Blueprint, Response
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from noodle.config.settings import CoordinatorConfig
from noodle.errors import InvalidRequest
from noodle.web.service import json_body, json_response
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api.auth import Clients, sent_by
from services.coordinator.api.body import Body, JsonObject, Neutral, decode_object, neutral, read, read_prompt
from services.coordinator.api.openapi import BODY_ERRORS, GENERATION_ERRORS, READY_ERRORS, Operation
from services.coordinator.api.parameters import (
    PROMPT_WORDS,
    STOP_TEXT,
    STOP_WORDS,
    TEXT_SCHEMA,
    TOKEN_IDS_SCHEMA,
    GenerationFields,
    NewTokens,
    StopString,
    stop_strings,
)
from services.coordinator.api.sse import event_stream, kept_alive, prompt_text, server_sent_event, whole, with_errors
from services.coordinator.coordinator import Coordinator
from services.coordinator.engine.request import FinishReason, Request
from services.coordinator.text.answer import Answer, Part
from services.coordinator.text.tokenizer import Tokenizer
from services.coordinator.text.vocabulary.base import Piece

MAXIMUM_STOP_STRINGS = 16
MAXIMUM_TEMPERATURE = 100.0
SAMPLING_TEMPERATURE = 1.0  # if sampling is asked for without a temperature
DEFAULT_NEW_TOKENS = 100
TOKENIZE_BODY_BYTES = 1 << 20  # each token of it becomes an object of the answer


class GenerateParameters(GenerationFields, kw_only=True):
    NEUTRAL: ClassVar[Neutral] = {
        **neutral("best_of typical_p repetition_penalty", 1),
        **neutral("frequency_penalty", 0),
        **neutral("watermark", False),
        **neutral("truncate grammar adapter_id"),
    }

    do_sample: Annotated[bool | None, Meta(description="Sample even without temperature, top_p and top_k.")] = None
    details: Annotated[bool, Meta(description="Report the log-probability of each token.")] = False
    decoder_input_details: Annotated[
        bool, Meta(description="Report those of the prompt's tokens too; needs `details`, not in streams.")
    ] = False
    top_n_tokens: Annotated[
        int,
        Meta(ge=0, le=MAXIMUM_TOP_LOGPROBS),
        Meta(description="Report this many of the likeliest tokens at each place; needs `details`."),
    ] = 0
    max_new_tokens: Annotated[
        NewTokens | None,
        Meta(description="Tokens to generate at most; absent: 100, or what is left of the context if that is less."),
    ] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=MAXIMUM_TEMPERATURE)] | None,
        Meta(description="0 is greedy, higher values are more random."),
    ] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Meta(max_length=MAXIMUM_STOP_STRINGS)] | None,
        Meta(description=STOP_TEXT, extra=STOP_WORDS),
    ] = None
    return_full_text: Annotated[bool, Meta(description="Put the prompt's text before the answer's.")] = False


class GenerateBody(Body, kw_only=True):
    parameters: GenerateParameters | None = None
    inputs: Annotated[
        str | list[Any],
        Meta(description="The prompt: a text or token ids.", extra=PROMPT_WORDS),
        Meta(extra_json_schema={"anyOf": [TEXT_SCHEMA, TOKEN_IDS_SCHEMA]}),
    ]

    @classmethod
    def refuse_first(cls, fields: JsonObject, _where: str) -> None:
        misplaced = sorted({*GenerateParameters.__struct_fields__, *GenerateParameters.NEUTRAL} & set(fields))
        if misplaced:
            raise InvalidRequest(
                f"'{misplaced[0]}' stands beside 'inputs'.",
                cure=f'Put it into \'parameters\': {{"inputs": ..., "parameters": {{"{misplaced[0]}": ...}}}}.',
                param=misplaced[0],
            )


class TokenizeBody(Body):
    inputs: str
    add_special_tokens: Annotated[bool, Meta(description="Whether the marks that a prompt gets are listed too.")] = True


class TokenObject(Struct, frozen=True):
    """One token. `text` is what it made final: text held back for stop strings comes with a later token."""

    id: int
    text: str
    special: bool
    logprob: float | UnsetType | None = UNSET  # with `details`


class PromptToken(Struct, frozen=True):
    id: int
    text: str
    logprob: float | None  # None for the first, for nothing precedes it


class Counts(Struct, frozen=True, kw_only=True):
    finish_reason: FinishReason
    generated_tokens: int
    prompt_tokens: int
    seed: int


class Details(Counts, frozen=True, kw_only=True):
    tokens: list[TokenObject]
    prefill: list[PromptToken] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    top_tokens: list[list[TokenObject]] | UnsetType = UNSET


class GenerateAnswer(Struct, frozen=True):
    generated_text: str
    details: Details


class TokenEvent(Struct, frozen=True):
    """One token of a stream; the last one also has the whole text and the counts."""

    index: Annotated[int, Meta(description="Counts from 1; also the event's id.")]
    token: TokenObject
    generated_text: str | None = None
    details: Counts | None = None
    top_tokens: list[TokenObject] | UnsetType = UNSET


class TokenPlace(Struct, frozen=True):
    id: int
    text: str
    start: Annotated[int, Meta(description="In characters of the text; a mark that the tokenizer added has no place.")]
    stop: int


OPERATIONS = (
    Operation(
        "POST /generate",
        summary="Continue a prompt, with details of each token",
        description="Answers as text-generation-inference does. The request is greedy unless temperature, top_p, top_k "
        "or do_sample ask for sampling.",
        answer=GenerateAnswer,
        errors=GENERATION_ERRORS,
        body=GenerateBody,
    ),
    Operation(
        "POST /generate_stream",
        summary="Continue a prompt as a stream",
        description="Sends one server-sent event for each token; the last one has the whole text.",
        errors=GENERATION_ERRORS,
        body=GenerateBody,
        event=TokenEvent,
    ),
    Operation(
        "POST /tokenize",
        summary="List the tokens of a text",
        description="Each token comes with its id and its place in the text.",
        answer=list[TokenPlace],
        errors=(*READY_ERRORS, *BODY_ERRORS),
        body=TokenizeBody,
    ),
)


class GenerateRequest(NamedTuple):
    prompt: str | tuple[int, ...]
    request: Request
    return_full_text: bool


def generate_routes(config: CoordinatorConfig, coordinator: Coordinator, clients: Clients) -> Blueprint:
    """Routes for clients: they require an API key or the cluster token, or without keys this machine's own address."""
    routes = Blueprint("generate", __name__)

    @routes.post("/generate")
    def generate() -> Response:
        answer, before = start(stream=False)
        return whole(answer, lambda: generate_answer(answer, before))

    @routes.post("/generate_stream")
    def generate_stream() -> Response:
        return event_stream(generate_events(*start(stream=True)))

    def start(*, stream: bool) -> tuple[Answer, str]:
        """Return the answer in progress, and the text that precedes it."""
        client = clients.require()
        model = coordinator.ready_model()
        body = json_body(config.maximum_body_bytes)
        prompt, request, return_full_text = parse_generate(
            body, vocabulary_size=model.served.vocabulary_size, stream=stream
        )
        before = prompt_text(prompt, model.tokenizer) if return_full_text else ""
        request = replace(request, prompt_token_ids=coordinator.token_ids(prompt))
        return coordinator.start(sent_by(client, request, body), client, prompt_name="inputs"), before

    @routes.post("/tokenize")
    def tokenize() -> Response:
        clients.require()
        tokenizer = coordinator.ready_model().tokenizer
        asked = read(decode_object(json_body(TOKENIZE_BODY_BYTES, "Send less text at once.")), TokenizeBody)
        pieces = tokenizer.pieces(asked.inputs, asked.add_special_tokens)
        return json_response([token_place(asked.inputs, piece, tokenizer) for piece in pieces])

    return routes


def parse_generate(body: bytes, *, vocabulary_size: int, stream: bool) -> GenerateRequest:
    """Check a body of /generate, or with `stream` of /generate_stream; raises InvalidRequest naming the field."""
    asked = read(decode_object(body), GenerateBody)
    parameters = asked.parameters or GenerateParameters()
    refuse_details(parameters, stream)
    length = parameters.max_new_tokens
    request = Request(
        **parameters.shared_values(),
        temperature=read_temperature(parameters),
        stop=stop_strings(parameters.stop),
        max_new_tokens=DEFAULT_NEW_TOKENS if length is None else length,
        length_name=None if length is None else "max_new_tokens",
        want_logprob=parameters.details,
        top_logprobs=parameters.top_n_tokens,
        score_prompt=parameters.decoder_input_details,
        stream=stream,
    )
    prompt = read_prompt(asked.inputs, "inputs", vocabulary_size)
    return GenerateRequest(prompt, request, parameters.return_full_text)


def refuse_details(asked: GenerateParameters, stream: bool) -> None:
    """Raise InvalidRequest for details beside `details` that is not true, and for those that no stream has."""
    for name in ("decoder_input_details", "top_n_tokens"):
        if getattr(asked, name) and not asked.details:
            raise InvalidRequest(
                f"'parameters.{name}' is given, but 'parameters.details' is not true.",
                cure="Set 'parameters.details'.",
                param=f"parameters.{name}",
            )
    if asked.decoder_input_details and stream:
        raise InvalidRequest(
            "'parameters.decoder_input_details' is not supported in a stream.",
            cure="Use /generate.",
            param="parameters.decoder_input_details",
        )


def read_temperature(asked: GenerateParameters) -> float:
    """The temperature, by default greedy unless something asks for sampling; `do_sample` may not contradict it."""
    is_sampled = asked.do_sample or asked.top_p < 1 or asked.top_k > 0
    default = SAMPLING_TEMPERATURE if is_sampled else 0.0
    temperature = default if asked.temperature is None else asked.temperature
    if asked.do_sample is not None and asked.do_sample != (temperature > 0):
        others = "the temperature is 0" if asked.do_sample else "a temperature, top_p or top_k asks for sampling"
        raise InvalidRequest(
            f"'parameters.do_sample' is {str(asked.do_sample).lower()}, but {others}.",
            cure="Leave one of them out.",
            param="parameters.do_sample",
        )
    return temperature


def generate_answer(answer: Answer, before: str) -> GenerateAnswer:
    """The whole answer; `before` is the text that precedes it."""
    request = answer.request
    details = Details(
        finish_reason=answer.finish_reason,
        generated_tokens=len(answer.parts),
        prompt_tokens=answer.prompt_tokens,
        seed=answer.request.seed,
        tokens=[token_object(part, answer) for part in answer.parts],
        prefill=prompt_tokens(answer) if request.want_logprob else UNSET,
        prompt_token_ids=answer.request.prompt_token_ids if request.want_logprob else UNSET,
        top_tokens=[top_objects(part, answer.tokenizer) for part in answer.parts] if request.top_logprobs else UNSET,
    )
    return GenerateAnswer(before + answer.text, details)


def generate_events(answer: Answer, before: str, after: int = 0) -> Iterator[bytes]:
    """One event for each token but the first `after`; its id is the token's number, by which a client resumes."""

    def events(part: Part) -> list[bytes]:
        count = len(answer.parts)
        if count <= after:
            return []
        return [server_sent_event(token_event(part, count, answer, before), event_id=str(count))]

    return with_errors(answer, kept_alive(answer, events))


def token_event(part: Part, count: int, answer: Answer, before: str) -> TokenEvent:
    """The event of the newest token, the number `count`."""
    text, details = None, None
    if part.finish_reason is not None:
        text = before + answer.text
        details = Counts(
            finish_reason=part.finish_reason,
            generated_tokens=count,
            prompt_tokens=answer.prompt_tokens,
            seed=answer.request.seed,
        )
    top = top_objects(part, answer.tokenizer) if answer.request.top_logprobs else UNSET
    return TokenEvent(count, token_object(part, answer), text, details, top)


def token_object(part: Part, answer: Answer) -> TokenObject:
    logprob = part.logprob if answer.request.want_logprob else UNSET
    return TokenObject(part.token_id, part.text, answer.tokenizer.is_special(part.token_id), logprob)


def top_objects(part: Part, tokenizer: Tokenizer) -> list[TokenObject]:
    """The likeliest tokens at a token's place, likeliest first, each with its own text."""
    return [
        TokenObject(
            each.token_id, tokenizer.texts.text_of(each.token_id), tokenizer.is_special(each.token_id), each.logprob
        )
        for each in part.top
    ]


def prompt_tokens(answer: Answer) -> list[PromptToken]:
    """The prompt's tokens with their log-probabilities, none unless the request asked for them."""
    if not answer.request.score_prompt:
        return []
    logprobs = [None, *(score.logprob for score in answer.prompt_scores)]
    return [
        PromptToken(token_id, answer.tokenizer.texts.text_of(token_id), logprob)
        for token_id, logprob in zip(answer.request.prompt_token_ids, logprobs, strict=True)
    ]


def token_place(text: str, piece: Piece, tokenizer: Tokenizer) -> TokenPlace:
    own = text[piece.start : piece.stop] or tokenizer.texts.name_of(piece.token_id)
    return TokenPlace(piece.token_id, own, piece.start, piece.stop)
