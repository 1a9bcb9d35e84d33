"""Every error that noodle raises on purpose, in one tree, with its HTTP status and code."""

from __future__ import annotations


class NoodleError(Exception):
    """Base of the tree; `message` tells what happened and where, `cure` what to do.

    A subclass names its HTTP status, its code and its OpenAI error type in its class statement, or inherits them.
    """

    http_status = 500
    code = "internal_error"
    error_type = "server_error"

    def __init_subclass__(cls, status: int | None = None, code: str = "", error_type: str = "") -> None:
        super().__init_subclass__()
        cls.http_status = status or cls.http_status
        cls.code = code or cls.code
        cls.error_type = error_type or cls.error_type

    def __init__(
        self, message: str, *, cure: str = "", param: str | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".strip()


class StartError(NoodleError, code="start_error"):
    """The process cannot start with its configuration."""


class ConfigurationError(StartError, code="configuration_error"):
    """A variable or option is unknown or has an invalid value."""


class ModelNotFound(StartError, code="model_not_found"):
    """NOODLE_MODEL names no readable model."""


class UnsupportedModel(StartError, code="unsupported_model"):
    """The model is readable, but noodle does not run its type, scaling or format."""


class PlanDoesNotFit(StartError, code="plan_does_not_fit"):
    """No assignment of layers to the machines is possible."""


class MemoryShort(PlanDoesNotFit):
    """The machines do not have enough memory for the model, or for the split that was asked for."""


class GgmlUnavailable(StartError, code="ggml_unavailable"):
    """ggml is not installed, or not built for this machine's processor."""


class TransformersUnavailable(StartError, code="transformers_unavailable"):
    """torch and transformers are needed and not installed: they are an extra of noodle."""


class NotWritable(StartError, code="not_writable"):
    """A folder that noodle writes to is full or not writable."""


class PortInUse(StartError, code="port_in_use"):
    """Another program listens on a port that a service needs."""


class RequestError(NoodleError, status=400, code="invalid_request", error_type="invalid_request_error"):
    """Base of the errors that the client can correct."""


class InvalidRequest(RequestError):
    """The body or a parameter is invalid; `param` names it."""


class ContextTooLong(InvalidRequest, code="context_length_exceeded"):
    """The prompt and max_tokens together exceed the context length."""


class NotAuthenticated(RequestError, status=401, code="invalid_api_key", error_type="authentication_error"):
    """A key or token is missing or wrong."""


class NotFound(RequestError, status=404, code="not_found"):
    """A route, model or request does not exist."""


class UnknownModel(NotFound, code="model_not_found"):
    """This cluster does not serve the requested model; names the models that it serves."""


class MethodNotAllowed(RequestError, status=405, code="method_not_allowed"):
    """The route exists, but not for this method."""


class RequestTooSlow(RequestError, status=408, code="request_too_slow"):
    """The head or body of a request did not arrive in time."""


class Conflict(RequestError, status=409, code="conflict"):
    """The request contradicts the state on the server."""


class Gone(RequestError, status=410, code="gone"):
    """The requested value existed, and has been fetched or has expired."""


class BodyTooLarge(RequestError, status=413, code="body_too_large"):
    """The body exceeds the limit of its route."""


class UnsupportedMediaType(RequestError, status=415, code="unsupported_media_type"):
    """The Content-Type is not one that the route reads."""


class Unprocessable(RequestError, status=422, code="unprocessable"):
    """The request is well-formed but cannot be computed, for example with a wrong hidden size."""


class TooManyRequests(RequestError, status=429, code="rate_limit_exceeded", error_type="rate_limit_error"):
    """A limit on concurrent requests is reached; carries Retry-After."""


class NotReady(NoodleError, status=503, code="not_ready"):
    """The cluster cannot answer yet; says what is missing, and carries Retry-After."""


class GenerationFailed(NoodleError, code="generation_failed"):
    """A request that had started cannot be finished."""


class RequestTimedOut(NoodleError, status=504, code="timed_out"):
    """A named timeout expired."""


class WireError(NoodleError, status=400, code="bad_frame"):
    """The received bytes are not a valid frame."""


class FrameTooLarge(WireError, status=413, code="frame_too_large"):
    """A frame exceeds the limit of its route; nothing was allocated for it."""


class StepRefused(NoodleError, status=409, code="step_refused"):
    """A stage must not compute a step; `reason` is a short code that is also a metric label."""

    def __init__(self, message: str, *, reason: str, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.reason = reason


class PositionGap(StepRefused):
    """The tokens before a step's first position did not arrive in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="position_gap")


class LinkLost(NoodleError, code="link_lost"):
    """The connection to another process is gone."""


class QueueUnavailable(NoodleError, status=503, code="queue_unavailable"):
    """Valkey does not answer, or refuses to store."""
