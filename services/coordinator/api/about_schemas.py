"""What /health and /info answer, as JSON Schema for /openapi.json."""

from __future__ import annotations

from services.coordinator.api.json_schema import BOOLEAN, COUNT, NUMBER, STRING, always, array, nullable, one_of

LAYERS = array(COUNT, minItems=2, maxItems=2)
HEALTH = always(
    {"service": one_of("coordinator"), "status": one_of("starting", "ready", "failed")},
    {
        "version": STRING,
        "detail": STRING,
        "progress": NUMBER,
        "waiting_for": array(STRING),
        "model": nullable(STRING),
        "plan": nullable(COUNT),
        "plan_reason": nullable(STRING),
        "context_length": nullable(COUNT),
        "warnings": array(STRING),
        "leads": BOOLEAN,
        "kept_kv_tokens": COUNT,
        "stages": array({"type": "object", "properties": {"stage_id": COUNT}, "required": ["stage_id"]}),
    },
)
INFO = always(
    {
        "model_id": STRING,
        "model_dtype": STRING,
        "vocabulary_size": COUNT,
        "max_total_tokens": COUNT,
        "max_input_tokens": COUNT,
        "max_concurrent_requests": COUNT,
        "max_waiting_requests": COUNT,
        "max_requests_per_key": nullable(COUNT),
        "max_body_bytes": COUNT,
        "max_stop_sequences": COUNT,
        "max_openai_stop_sequences": COUNT,
        "max_top_n_tokens": COUNT,
        "step_tokens": COUNT,
        "version": STRING,
        "plan": COUNT,
        "stages": array(always({"stage_id": COUNT, "machine": STRING, "layers": LAYERS, "dtype": STRING})),
    }
)
