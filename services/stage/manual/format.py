"""The JSON that POST /forward receives and returns, and the tensors in it, checked against the plan (design D5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from noodle.cluster.plan import Plan
from noodle.errors import InvalidRequest, NotFound, Unprocessable
from noodle.wire.frames import ActivationTensor
from services.stage.executors.hidden_states import decode

MAXIMUM_FORWARD_TOKENS = 512  # of one forward
_ABSENT = msgspec.Raw(b"null")
_NESTED: dict[type, tuple[Any, ...]] = {
    float: (list[float], list[list[float]], list[list[list[float]]]),
    int: (list[int], list[list[int]]),
}


class ForwardBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of the user's guide, then noodle's."""

    session_id: Annotated[str, Meta(min_length=1, max_length=64)] | int
    activations: msgspec.Raw = _ABSENT  # [hidden], [tokens, hidden] or [1, tokens, hidden] numbers
    token_ids: msgspec.Raw = _ABSENT  # [tokens] or [1, tokens]; the first stage only
    token_index: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None  # position of the first token; None: the next
    stage_id: str | int | None = None
    end: bool = False  # free the session after this
    logits: bool = False  # the last stage: also the logits of the last token


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """A checked forward: `tensor` is int32 [tokens] of token ids, or float32 [tokens, hidden_size].

    Without a tensor the request only ends its session. `rank` is that of the activations as they came.
    """

    session_id: str
    tensor: ActivationTensor | None
    rank: int
    token_index: int | None
    end: bool
    logits: bool


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Hidden states [tokens, hidden_size], or on the last stage the logits [vocab_size] of the last token.

    A request that only ended its session has neither.
    """

    next_token_index: int
    hidden_states: ActivationTensor | None = None
    logits: npt.NDArray[np.float32] | None = None


def parse_forward(body: bytes, plan: Plan, index: int) -> ForwardRequest:
    """Parse a body for the plan's stage `index`; raises InvalidRequest, or Unprocessable if it cannot be computed."""
    fields: ForwardBody = decode_body(body, ForwardBody)
    stage_id = plan.stages[index].stage_id
    check_stage_id(fields.stage_id, stage_id)
    session_id = str(fields.session_id)
    if len(session_id) > 64 or not session_id.isprintable():
        raise InvalidRequest("session_id is not 1 to 64 printable characters.", param="session_id")
    tensor, rank = None, 2
    if fields.activations != _ABSENT and fields.token_ids != _ABSENT:
        raise InvalidRequest("Both activations and token_ids came.", cure="Send one of them.", param="token_ids")
    if fields.activations != _ABSENT:
        tensor, rank = _activations(fields.activations, plan.hidden_size)
    elif fields.token_ids != _ABSENT:
        tensor = _token_ids(fields.token_ids, plan, index)
    elif not fields.end:
        accepted = "token_ids or activations" if index == 0 else "activations"
        raise InvalidRequest(
            f"There is nothing to compute: stage {stage_id} takes {accepted}.",
            cure='Send them, or "end": true to free the session.',
            param="activations",
        )
    return ForwardRequest(
        session_id, tensor, rank, token_index=fields.token_index, end=fields.end, logits=fields.logits
    )


def forward_answer(request: ForwardRequest, result: ForwardResult, stage_id: int) -> dict[str, Any]:
    """`{success, session_id, stage_id, next_token_index, output}`; activations have the rank they came in.

    The last stage's output is the likeliest next token.
    """
    output: dict[str, Any] = {}
    if result.hidden_states is not None:
        tokens, hidden_size = result.hidden_states.shape
        shape = {1: (hidden_size,), 2: (tokens, hidden_size), 3: (1, tokens, hidden_size)}[request.rank]
        numbers = decode(result.hidden_states).reshape(shape)
        output = {"activations": numbers.tolist(), "shape": list(shape), "dtype": result.hidden_states.dtype}
    elif result.logits is not None:
        output = {"token_ids": [int(result.logits.argmax())], "shape": [1]}
        if request.logits:
            output["logits"] = result.logits.tolist()
    return {
        "success": True,
        "session_id": request.session_id,
        "stage_id": stage_id,
        "next_token_index": result.next_token_index,
        "output": output,
    }


def check_stage_id(asked: str | int | None, stage_id: int) -> None:
    """Raise NotFound when a request is for another stage than this one."""
    if asked is not None and str(asked) != str(stage_id):
        raise NotFound(
            f"This is stage {stage_id}, not stage {str(asked)[:40]!r}.",
            cure="Ask that stage, or the coordinator's POST /stage/<id>/forward.",
            param="stage_id",
        )


def decode_body(body: bytes | msgspec.Raw, kind: Any, cure: str = "", name: str = "") -> Any:
    """Decode JSON, or the field `name` of it, as `kind`; raises InvalidRequest with the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        path = re.search(r" - at `\$\.?(.*)`$", str(error))
        field = (name + path[1] if path else name).strip(".")[:80]
        what = re.sub(r" - at `.*`$", "", str(error)).removeprefix("JSON is malformed: ")
        raise InvalidRequest(
            f"Invalid value for '{field}': {what}." if field else f"The body is invalid: {what}.",
            cure=cure or f"Send {{{', '.join(ForwardBody.__struct_fields__)}}}.",
            param=re.split(r"[.\[]", field)[0] or None,
        ) from error


def _nested(raw: msgspec.Raw, name: str, item: type) -> tuple[Any, int]:
    """Decode a nested list of numbers and return its depth; booleans and texts are not numbers."""
    start = bytes(memoryview(raw)[:64]).translate(None, b" \t\r\n")
    depth = len(start) - len(start.lstrip(b"["))
    if not 1 <= depth <= len(_NESTED[item]):
        raise InvalidRequest(
            f"'{name}' is not a list of numbers, nested at most {len(_NESTED[item])} deep.", param=name
        )
    return decode_body(raw, _NESTED[item][depth - 1], name=name), depth


def _activations(raw: msgspec.Raw, hidden_size: int) -> tuple[ActivationTensor, int]:
    rows, depth = _nested(raw, "activations", float)
    if depth == 1:
        rows = [rows]
    elif depth == 3:
        if len(rows) != 1:
            raise Unprocessable(
                f"The activations are a batch of {len(rows)}.", cure="Send one session at a time.", param="activations"
            )
        rows = rows[0]
    for row in rows:
        if len(row) != hidden_size:
            raise Unprocessable(
                f"The activations have {len(row)} numbers a token, but the hidden size of this model is {hidden_size}.",
                cure=f"Send [{hidden_size}], [tokens, {hidden_size}] or [1, tokens, {hidden_size}] numbers.",
                param="activations",
            )
    _check_token_count(len(rows), "activations")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite and is refused below
        numbers = np.array(rows, np.float32)
    if not np.isfinite(numbers).all():
        raise Unprocessable("The activations hold infinite numbers.", param="activations")
    return ActivationTensor("float32", numbers.shape, numbers.data.cast("B")), depth


def _token_ids(raw: msgspec.Raw, plan: Plan, index: int) -> ActivationTensor:
    ids, depth = _nested(raw, "token_ids", int)
    if index != 0:
        raise Unprocessable(
            f"Stage {plan.stages[index].stage_id} is not the first one and takes no token ids.",
            cure=f"Send it the activations of the stage before it, {plan.hidden_size} numbers a token.",
            param="token_ids",
        )
    if depth == 2:
        if len(ids) != 1:
            shape = [len(ids), len(ids[0])]
            raise Unprocessable(
                f"The token ids have the shape {shape}.", cure="Send [tokens] or [1, tokens].", param="token_ids"
            )
        ids = ids[0]
    _check_token_count(len(ids), "token_ids")
    if min(ids) < 0 or max(ids) >= plan.vocab_size:
        raise Unprocessable(f"A token id is not from 0 to {plan.vocab_size - 1}.", param="token_ids")
    packed = np.array(ids, np.int32)
    return ActivationTensor("int32", packed.shape, packed.data.cast("B"))


def _check_token_count(tokens: int, name: str) -> None:
    if not 1 <= tokens <= MAXIMUM_FORWARD_TOKENS:
        raise Unprocessable(
            f"{tokens} tokens came; one forward takes 1 to {MAXIMUM_FORWARD_TOKENS}.",
            cure="Send more of them in several forwards of one session, each with its token_index.",
            param=name,
        )
