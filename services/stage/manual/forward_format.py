"""What POST /forward takes and answers: JSON or raw bytes to a checked tensor and back; knows shapes, computes nothing.

A shape that does not fit the plan is refused before anything of its size is allocated (design D5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from noodle.cluster.plan import Plan
from noodle.errors import InvalidRequest, NotFound, Unprocessable
from noodle.wire.frames import ITEM_BYTES, ActivationTensor, checked_tensor

MAXIMUM_FORWARD_TOKENS = 512  # of one forward
DTYPE_HEADER = "X-Noodle-Dtype"
SHAPE_HEADER = "X-Noodle-Shape"
RAW_TYPE = "application/octet-stream"
_ABSENT = msgspec.Raw(b"null")
_NESTED: dict[type, tuple[Any, ...]] = {
    float: (list[float], list[list[float]], list[list[list[float]]]),
    int: (list[int], list[list[int]]),
}


class ForwardBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The guide's fields, then noodle's; with raw bytes all but the tensors come in the query."""

    session_id: str | int
    activations: msgspec.Raw = _ABSENT
    token_ids: msgspec.Raw = _ABSENT
    token_index: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    stage_id: str | int | None = None
    end: bool = False  # free the session after this
    logits: bool = False  # the last stage: also the logits of the last token


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """A checked forward: `tensor` is int32 [tokens] of token ids, or [tokens, hidden_size] numbers.

    None is a request that only ends its session. `rank` is that of the activations as they came.
    """

    session_id: str
    tensor: ActivationTensor | None
    rank: int
    token_index: int | None
    end: bool
    logits: bool


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Hidden states [tokens, hidden_size] off the last stage; on it the likeliest next token, by logits [vocab_size].

    Neither for a request that only ended its session.
    """

    next_token_index: int
    hidden_states: ActivationTensor | None = None
    token_id: int | None = None
    logits: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Takes:
    """What a stage takes by its plan."""

    stage_id: int
    index: int
    hidden_size: int
    vocab_size: int

    @staticmethod
    def of(plan: Plan, index: int) -> Takes:
        """By a place in a plan."""
        return Takes(plan.stages[index].stage_id, index, plan.hidden_size, plan.vocab_size)


def parse_json(body: bytes, takes: Takes) -> ForwardRequest:
    """A JSON body; raises InvalidRequest for what is no such object, Unprocessable for what can not be computed."""
    fields: ForwardBody = _decoded(body, ForwardBody)
    check_stage_id(fields.stage_id, takes.stage_id)
    tensor, rank = None, 2
    if fields.activations != _ABSENT and fields.token_ids != _ABSENT:
        raise InvalidRequest("Both activations and token_ids came.", cure="Send one of them.", param="token_ids")
    if fields.activations != _ABSENT:
        tensor, rank = _activations(fields.activations, takes)
    elif fields.token_ids != _ABSENT:
        tensor = _token_ids(fields.token_ids, takes)
    return _request(fields, tensor, rank, takes)


def parse_raw_header(dtype: str, shape_text: str, takes: Takes) -> tuple[tuple[int, ...], int]:
    """The shape that a raw body's headers announce, and its bytes; refused here, nothing is read for it."""
    if dtype not in ITEM_BYTES:
        raise Unprocessable(
            f"{DTYPE_HEADER} is {dtype[:40]!r}.", cure=f"Send one of {', '.join(ITEM_BYTES)}.", param=DTYPE_HEADER
        )
    if not re.fullmatch(r"\d{1,9}( ?, ?\d{1,9}){0,2}", shape_text):
        raise Unprocessable(
            f"{SHAPE_HEADER} is {shape_text[:40]!r}.",
            cure=f"Send the sizes with commas, as 5,{takes.hidden_size}.",
            param=SHAPE_HEADER,
        )
    shape = tuple(int(size) for size in shape_text.split(","))
    if dtype == "int32":
        _check_token_shape(shape, takes)
    else:
        _check_shape(shape, takes)
    return shape, math.prod(shape) * ITEM_BYTES[dtype]


def parse_raw(
    query: Mapping[str, str], dtype: str, shape: tuple[int, ...], body: bytes, takes: Takes
) -> ForwardRequest:
    """A raw body, whose shape was checked by `parse_raw_header`."""
    fields = _from_query(query)
    check_stage_id(fields.stage_id, takes.stage_id)
    if dtype == "int32":
        ids = checked_tensor(dtype, (math.prod(shape),), memoryview(body))
        _check_token_range(np.frombuffer(body, np.int32), takes)
        return _request(fields, ids, 2, takes)
    tensor = checked_tensor(dtype, (math.prod(shape[:-1]), takes.hidden_size), memoryview(body))
    if not all_finite(tensor):
        _raise_not_finite()
    return _request(fields, tensor, len(shape), takes)


def answer_json(request: ForwardRequest, result: ForwardResult, takes: Takes) -> dict[str, Any]:
    """`{success, session_id, stage_id, next_token_index, output}`; activations come back in the rank they came in."""
    output: dict[str, Any] = {}
    if result.hidden_states is not None:
        numbers = as_float32(result.hidden_states).reshape(shape_of(request, result))
        output = {"activations": numbers.tolist(), "shape": list(numbers.shape), "dtype": result.hidden_states.dtype}
    elif result.token_id is not None:
        output = {"token_ids": [result.token_id], "shape": [1]}
        if result.logits is not None:
            output["logits"] = result.logits.tolist()
    return {
        "success": True,
        "session_id": request.session_id,
        "stage_id": takes.stage_id,
        "next_token_index": result.next_token_index,
        "output": output,
    }


def answer_raw(request: ForwardRequest, result: ForwardResult) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a raw answer: hidden states in the stage's own dtype, or the token id as int32."""
    if result.hidden_states is not None:
        dtype, shape, body = result.hidden_states.dtype, shape_of(request, result), bytes(result.hidden_states.data)
    else:
        dtype, shape, body = "int32", (1,), np.array([result.token_id], np.int32).tobytes()
    return body, {
        DTYPE_HEADER: dtype,
        SHAPE_HEADER: ",".join(map(str, shape)),
        "X-Noodle-Next-Token-Index": str(result.next_token_index),
    }


def shape_of(request: ForwardRequest, result: ForwardResult) -> tuple[int, ...]:
    """The hidden states' shape in the answer: [hidden], [tokens, hidden] or [1, tokens, hidden], as they came."""
    assert result.hidden_states is not None  # noqa: S101  # only asked for where there are some
    tokens, hidden_size = result.hidden_states.shape
    return {1: (hidden_size,), 2: (tokens, hidden_size), 3: (1, tokens, hidden_size)}[request.rank]


def all_finite(tensor: ActivationTensor) -> bool:
    """Whether no number is infinite or not a number."""
    if tensor.dtype == "bfloat16":  # numpy has none; it is the upper half of a float32
        return bool(((np.frombuffer(tensor.data, np.uint16) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(np.frombuffer(tensor.data, tensor.dtype)).all())


def as_float32(tensor: ActivationTensor) -> npt.NDArray[np.float32]:
    """The numbers of any float dtype; exact."""
    if tensor.dtype == "bfloat16":
        return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, tensor.dtype).astype(np.float32).reshape(tensor.shape)


def check_stage_id(asked: str | int | None, stage_id: int) -> None:
    """Raise NotFound when a request is for another stage than this one."""
    if asked is not None and str(asked) != str(stage_id):
        raise NotFound(
            f"This is stage {stage_id}, not stage {str(asked)[:40]!r}.",
            cure="Ask that stage, or the coordinator's POST /stage/<id>/forward.",
            param="stage_id",
        )


def _request(fields: ForwardBody, tensor: ActivationTensor | None, rank: int, takes: Takes) -> ForwardRequest:
    session_id = str(fields.session_id)
    if not 1 <= len(session_id) <= 64 or not session_id.isprintable():
        raise InvalidRequest("session_id is not 1 to 64 printable characters.", param="session_id")
    if tensor is None and not fields.end:
        wants = "token_ids or activations" if takes.index == 0 else "activations"
        raise InvalidRequest(
            f"There is nothing to compute: stage {takes.stage_id} takes {wants}.",
            cure='Send them, or "end": true to free the session.',
            param="activations",
        )
    return ForwardRequest(session_id, tensor, rank, fields.token_index, fields.end, fields.logits)


def _from_query(query: Mapping[str, str]) -> ForwardBody:
    """The fields beside the tensor, from the query of a raw request."""
    values: dict[str, Any] = dict(query)
    for name in ("activations", "token_ids"):
        if name in values:
            raise InvalidRequest(f"{name} comes as the raw body, not in the query.", param=name)
    for name in ("end", "logits"):
        if name in values:
            values[name] = {"1": True, "true": True, "0": False, "false": False}.get(values[name], values[name])
    try:
        return msgspec.convert(values, ForwardBody, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(error) from error


def _decoded(body: bytes | msgspec.Raw, kind: Any, name: str = "") -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _refusal(error, name) from error


def _refusal(error: Exception, name: str = "") -> InvalidRequest:
    """msgspec's words, with the field they are about."""
    text = str(error)
    path = re.search(r" - at `\$\.?(.*)`$", text)
    field = (name + path[1] if path else name).strip(".")[:80]
    what = re.sub(r" - at `.*`$", "", text).removeprefix("JSON is malformed: ")
    return InvalidRequest(
        f"Invalid value for '{field}': {what}." if field else f"The body is not what a forward takes: {what}.",
        cure="It is {session_id, activations or token_ids, token_index, stage_id, end, logits}.",
        param=re.split(r"[.\[]", field)[0] or None,
    )


def _nested(raw: msgspec.Raw, name: str, item: type) -> tuple[Any, int]:
    """A list of numbers, or lists of them, and how deep it is nested; booleans and texts are no numbers."""
    start = bytes(memoryview(raw)[:64]).translate(None, b" \t\r\n")
    depth = len(start) - len(start.lstrip(b"["))
    if not 1 <= depth <= len(_NESTED[item]):
        raise InvalidRequest(
            f"'{name}' is not a list of numbers, nested at most {len(_NESTED[item])} deep.", param=name
        )
    return _decoded(raw, _NESTED[item][depth - 1], name), depth


def _activations(raw: msgspec.Raw, takes: Takes) -> tuple[ActivationTensor, int]:
    value, depth = _nested(raw, "activations", float)
    if depth == 3:
        _check_shape((len(value), len(value[0]) if value else 0, takes.hidden_size), takes)
        value = value[0]
    rows = [value] if depth == 1 else value
    for row in rows:
        _check_shape((len(rows), len(row)), takes)
    _check_shape((len(rows), takes.hidden_size), takes)
    with np.errstate(over="ignore"):  # what is too large for float32 is refused as infinite
        numbers = np.array(rows, np.float32)
    tensor = ActivationTensor("float32", numbers.shape, numbers.data.cast("B"))
    if not all_finite(tensor):
        _raise_not_finite()
    return tensor, depth


def _token_ids(raw: msgspec.Raw, takes: Takes) -> ActivationTensor:
    value, depth = _nested(raw, "token_ids", int)
    if depth == 2:
        _check_token_shape((len(value), len(value[0]) if value else 0), takes)
        value = value[0]
    _check_token_shape((len(value),), takes)
    if not (min(value) >= 0 and max(value) < takes.vocab_size):  # before numpy, which has no larger integers
        _raise_token_range(takes)
    ids = np.array(value, np.int32)
    return ActivationTensor("int32", ids.shape, ids.data.cast("B"))


def _check_shape(shape: tuple[int, ...], takes: Takes) -> None:
    """Of activations: [hidden], [tokens, hidden] or [1, tokens, hidden]."""
    size = takes.hidden_size
    if shape[-1] != size:
        raise Unprocessable(
            f"The activations have {shape[-1]} numbers a token, but the hidden size of this model is {size}.",
            cure=f"Send [{size}], [tokens, {size}] or [1, tokens, {size}] numbers.",
            param="activations",
        )
    if len(shape) == 3 and shape[0] != 1:
        raise Unprocessable(
            f"The activations are a batch of {shape[0]}.", cure="A forward is of one session.", param="activations"
        )
    _check_token_count(math.prod(shape[:-1]), "activations")


def _check_token_shape(shape: tuple[int, ...], takes: Takes) -> None:
    if takes.index != 0:
        raise Unprocessable(
            f"Stage {takes.stage_id} is not the first one and takes no token ids.",
            cure=f"Send it the activations of the stage before it, {takes.hidden_size} numbers a token.",
            param="token_ids",
        )
    if len(shape) == 3 or (len(shape) == 2 and shape[0] != 1):
        raise Unprocessable(
            f"The token ids have the shape {list(shape)}.", cure="Send [tokens] or [1, tokens].", param="token_ids"
        )
    _check_token_count(math.prod(shape), "token_ids")


def _check_token_count(tokens: int, name: str) -> None:
    if not 1 <= tokens <= MAXIMUM_FORWARD_TOKENS:
        raise Unprocessable(
            f"{tokens} tokens came; one forward takes 1 to {MAXIMUM_FORWARD_TOKENS}.",
            cure="Send more of them in several forwards of one session, each with its token_index.",
            param=name,
        )


def _check_token_range(ids: npt.NDArray[np.int32], takes: Takes) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= takes.vocab_size:
        _raise_token_range(takes)


def _raise_token_range(takes: Takes) -> None:
    raise Unprocessable(f"A token id is not from 0 to {takes.vocab_size - 1}.", param="token_ids")


def _raise_not_finite() -> None:
    raise Unprocessable("The activations hold numbers that are infinite or none.", param="activations")
