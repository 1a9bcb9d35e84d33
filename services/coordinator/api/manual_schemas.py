"""What /openapi.json says of the guide's routes, of weights (weight_store.py) and Prometheus' targets."""

from __future__ import annotations

from services.coordinator.api.json_schema import (
    BOOLEAN,
    INTEGER,
    STRING,
    always,
    array,
)
from services.coordinator.api.openapi import ERROR, Operation

AN_OBJECT = {"type": "object"}
# The guide's answers say `success` beside whatever else they have, errors as well.
GUIDE_ERROR = {
    **ERROR,
    "properties": {**ERROR["properties"], "success": {"const": False}},
    "required": ["error", "success"],
}
FORWARD = {
    "type": "object",
    "properties": {
        "session_id": STRING,
        "token_ids": {"type": "array"},
        "activations": {"type": "array"},
        "token_index": INTEGER,
        "stage_id": {},
        "logits": BOOLEAN,
        "end": BOOLEAN,
    },
}
FORWARD_ANSWER = {
    "type": "object",
    "properties": {"success": {"const": True}, "output": AN_OBJECT},
    "required": ["success", "output"],
}
PLAN_ANSWER = {"type": "object", "properties": {"success": {"const": True}}, "required": ["success", "plan"]}


def guide_errors(**texts: str) -> dict[int, tuple[str, dict[str, object]]]:
    """Statuses with what they mean here."""
    return {int(status.removeprefix("status_")): (text, GUIDE_ERROR) for status, text in texts.items()}


COMMON = {
    "status_400": "The request is wrong.",
    "status_401": "The key or cluster token is missing or wrong.",
    "status_408": "The body did not come in time.",
    "status_413": "The body is too large.",
    "status_415": "The body is not declared as what is read here.",
    "status_429": "As many as may be are in progress; Retry-After says when to come again.",
    "status_500": "The request could not be finished.",
    "status_503": "The cluster is not ready, or another service does not answer.",
    "status_504": "Another service took too long.",
}
OPERATIONS = (
    Operation(
        "post",
        "/stage/{stage_id}/forward",
        "A forward by hand: token ids or activations through the layers of one stage.",
        FORWARD_ANSWER,
        (),
        body=FORWARD,
        other_answers=guide_errors(
            **COMMON,
            status_404="There is no such stage.",
            status_409="The position is not the one that the session is at, or the stage has another plan.",
            status_422="The activations are not of the stage's hidden size, or can not be computed.",
            status_502="The stage could not be reached.",
        ),
    ),
    Operation(
        "post",
        "/plan/generate",
        "The plan for `available_nodes`, or for the machines that are registered; changes none.",
        PLAN_ANSWER,
        (),
        body={"type": ["object", "array"]},
        other_answers=guide_errors(
            **COMMON, status_422="The model does not fit: who is short of how much.", status_502="No planner answers."
        ),
    ),
    Operation(
        "get",
        "/prometheus/targets",
        "Where Prometheus finds every /metrics, for its HTTP service discovery; with the cluster token alone.",
        array(always({"targets": array(STRING), "labels": {"type": "object", "additionalProperties": STRING}})),
        (401,),
    ),
    Operation(
        "get",
        "/weights",
        "What the model is made of, to the byte range and digest of each tensor; with the cluster token alone.",
        AN_OBJECT,
        (401, 503),
    ),
    Operation(
        "get",
        "/weights/files/{name}",
        "One range of bytes of a file of the model, answered 206; with the cluster token alone.",
        None,
        (400, 401, 404, 503),
        other_answers={206: ("The bytes.", {"type": "string"})},
    ),
)
