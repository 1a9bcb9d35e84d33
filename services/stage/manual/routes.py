"""The stage's routes of the user's guide: load a range by hand, and compute a forward by hand (docs/adr/0014)."""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Blueprint, Response, request

from noodle.config.settings import StageConfig
from noodle.errors import InvalidRequest, NotReady, Unprocessable
from noodle.web.service import add_success_false, bounded_body, json_body, json_response, require_token
from services.stage.lifecycle import Lifecycle
from services.stage.manual import forward_format
from services.stage.manual.forward_format import DTYPE_HEADER, RAW_TYPE, SHAPE_HEADER, ForwardRequest, Takes
from services.stage.stage import Stage
from services.stage.worker.worker import Role

FORWARD_BODY_BYTES = 8 << 20
LOAD_BODY_BYTES = 64 << 10
RAW_CURE = "Send fewer tokens in one forward, or raw bytes, which are a fifth of the JSON."


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What POST /load_model may say: the range it expects, and whether a loaded one is loaded again."""

    start_layer: int | None = None
    end_layer: int | None = None
    reload: bool = False


def guide_routes(config: StageConfig, stage: Stage, lifecycle: Lifecycle) -> Blueprint:
    """`POST /load_model/<stage_id>` and `POST /forward`; both want the cluster token."""
    routes = Blueprint("guide", __name__)
    add_success_false(routes)

    @routes.post("/load_model/<stage_id>")
    def load_model(stage_id: str) -> Response:
        require_token(config.cluster_token)
        forward_format.check_stage_id(stage_id, config.stage_id)
        asked = _load_body()
        return json_response({"success": True, **lifecycle.load_now(asked.start_layer, asked.end_layer, asked.reload)})

    @routes.post("/forward")
    def forward() -> Response:
        require_token(config.cluster_token)
        role = _role(stage)
        takes = Takes.of(role.plan, role.index)
        with stage.forwards.place():
            asked = _forward_request(takes)
            wants_raw = _wants_raw()
            if asked.logits and (wants_raw or role.next_stage is not None):
                raise InvalidRequest(
                    "Logits come from the last stage, as JSON.", cure="Ask that one, without raw bytes.", param="logits"
                )
            result = stage.forwards.compute(role, asked)
            if wants_raw and asked.tensor is not None:
                body, headers = forward_format.answer_raw(asked, result)
                return Response(body, headers=headers, mimetype=RAW_TYPE)
            return json_response(forward_format.answer_json(asked, result, takes))

    return routes


def _role(stage: Stage) -> Role:
    role = stage.role
    if role is None:
        raise NotReady(
            f"Stage {stage.config.stage_id} on {stage.config.machine} has no layers loaded.",
            cure="Wait for it, or POST /load_model/<stage_id>; its /health says what it does.",
            retry_after_seconds=2,
        )
    return role


def _forward_request(takes: Takes) -> ForwardRequest:
    """JSON, or raw bytes whose headers are checked before a byte of them is read."""
    if request.mimetype != RAW_TYPE:
        return forward_format.parse_json(json_body(FORWARD_BODY_BYTES, RAW_CURE), takes)
    dtype = request.headers.get(DTYPE_HEADER, "")
    shape, expected_bytes = forward_format.parse_raw_header(dtype, request.headers.get(SHAPE_HEADER, ""), takes)
    announced = request.content_length
    if announced is not None and announced != expected_bytes:
        raise Unprocessable(
            f"{SHAPE_HEADER} {','.join(map(str, shape))} of {dtype} takes {expected_bytes} bytes, "
            f"but {announced} were announced.",
            param=SHAPE_HEADER,
        )
    body = bounded_body(min(expected_bytes, FORWARD_BODY_BYTES))
    return forward_format.parse_raw(request.args, dtype, shape, body, takes)


def _wants_raw() -> bool:
    best = request.accept_mimetypes.best_match(["application/json", RAW_TYPE], default="application/json")
    return best == RAW_TYPE


def _load_body() -> LoadBody:
    """An empty body asks for what the plan says."""
    body: Any = bounded_body(LOAD_BODY_BYTES)
    if not body.strip():
        return LoadBody()
    try:
        return msgspec.json.decode(body, type=LoadBody)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The body is not what a load takes: {error}.",
            cure="Send nothing, or {start_layer, end_layer, reload}.",
        ) from error
