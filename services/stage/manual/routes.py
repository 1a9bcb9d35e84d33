"""The stage's routes of the user's guide: load its layers, and compute a forward, by hand (docs/adr/0014)."""

from __future__ import annotations

import msgspec
from flask import Blueprint, Response

from noodle.config.settings import StageConfig
from noodle.errors import InvalidRequest, NotReady
from noodle.web.service import add_success_false, bounded_body, json_body, json_response, require_token
from services.stage.lifecycle import Lifecycle
from services.stage.manual.format import check_stage_id, decode_body, forward_answer, parse_forward
from services.stage.manual.forward import Forwards
from services.stage.stage import Stage

FORWARD_BODY_BYTES = 8 << 20
LOAD_BODY_BYTES = 64 << 10


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /load_model: the expected range, and whether to load again what is loaded."""

    start_layer: int | None = None
    end_layer: int | None = None
    reload: bool = False


def guide_routes(config: StageConfig, stage: Stage, lifecycle: Lifecycle) -> Blueprint:
    """`POST /load_model/<stage_id>` and `POST /forward`; both want the cluster token."""
    routes = Blueprint("guide", __name__)
    forwards = Forwards(config.stage_id, stage.worker, stage.metrics)
    add_success_false(routes)

    @routes.post("/load_model/<stage_id>")
    def load_model(stage_id: str) -> Response:
        """Load this stage's layers of the newest plan and answer when they are loaded."""
        require_token(config.cluster_token)
        check_stage_id(stage_id, config.stage_id)
        body = bounded_body(LOAD_BODY_BYTES)
        cure = "Send nothing, or {start_layer, end_layer, reload}."
        asked: LoadBody = decode_body(body, LoadBody, cure) if body.strip() else LoadBody()
        return json_response({"success": True, **lifecycle.load_now(asked.start_layer, asked.end_layer, asked.reload)})

    @routes.post("/forward")
    def forward() -> Response:
        """Compute one forward by hand with this stage's layers."""
        require_token(config.cluster_token)
        role = stage.role
        if role is None:
            raise NotReady(
                f"Stage {config.stage_id} on {config.machine} has no layers loaded.",
                cure="Wait for it, or POST /load_model/<stage_id>; its /health shows its progress.",
                retry_after_seconds=2,
            )
        with forwards.place():
            body = json_body(FORWARD_BODY_BYTES, "Send fewer tokens in one forward.")
            asked = parse_forward(body, role.plan, role.index)
            if asked.logits and role.next_stage is not None:
                raise InvalidRequest("Logits come from the last stage.", cure="Ask that one.", param="logits")
            result = forwards.compute(role, asked)
            return json_response(forward_answer(asked, result, config.stage_id))

    return routes
