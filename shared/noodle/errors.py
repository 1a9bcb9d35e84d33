"""Every error noodle raises on purpose, in one tree; knows what each means over HTTP, not who raises it.

NoodleError
├── StartError                 the process can not start: says what to change
│   ├── ConfigurationError     a variable or option is wrong or unknown
│   ├── ModelNotFound          NOODLE_MODEL names nothing that can be read
│   ├── UnsupportedModel       the model is there, but noodle does not run it
│   ├── PlanDoesNotFit         the model and these machines do not go together
│   │   └── MemoryShort        because of their memory
│   ├── GgmlUnavailable        ggml is missing, or can not compute on this machine
│   ├── NotWritable            a folder that noodle keeps things in is full or not ours
│   └── PortInUse              another program listens where we want to
├── RequestError               the request is wrong; 4xx
│   ├── InvalidRequest         400, names the parameter
│   │   └── ContextTooLong     400, prompt + max_tokens over the context
│   ├── NotAuthenticated       401
│   ├── NotFound               404
│   │   └── UnknownModel       404, names the models served
│   ├── MethodNotAllowed       405
│   ├── RequestTooSlow         408
│   ├── Conflict               409
│   ├── Gone                   410, was there: fetched already, or expired
│   ├── BodyTooLarge           413
│   ├── UnsupportedMediaType   415
│   ├── Unprocessable          422, understood but not computable (a wrong hidden size)
│   └── TooManyRequests        429, with Retry-After
├── NotReady                   503, with Retry-After and what is being waited for
├── GenerationFailed           500, a request that had begun could not be finished
├── RequestTimedOut            504, a wait with a name ran out
├── WireError                  bytes that are not a frame of ours
│   └── FrameTooLarge          over the cap, refused before anything is allocated
├── StepRefused                a frame of ours that this stage must not compute; carries a `reason` code
│   └── PositionGap            earlier tokens of the session never came
├── LinkLost                   the connection to the next process is gone
└── QueueUnavailable           Valkey does not answer, or is full
"""

from __future__ import annotations


class NoodleError(Exception):
    """Base of all; `message` says what happened and where, `cure` what to do."""

    http_status = 500
    code = "internal_error"
    error_type = "server_error"

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


class StartError(NoodleError):
    """Raised when a process can not start as it is configured."""

    code = "start_error"


class ConfigurationError(StartError):
    """Raised when a variable or option is unknown or has a value that means nothing."""

    code = "configuration_error"


class ModelNotFound(StartError):
    """Raised when NOODLE_MODEL names no readable model."""

    code = "model_not_found"


class UnsupportedModel(StartError):
    """Raised when a model is readable but its type, scaling or format is not run here."""

    code = "unsupported_model"


class PlanDoesNotFit(StartError):
    """Raised when no assignment of layers to the machines is possible."""

    code = "plan_does_not_fit"


class MemoryShort(PlanDoesNotFit):
    """Raised when the machines' memory does not hold the model, however it is cut or as it was asked to be."""


class GgmlUnavailable(StartError):
    """Raised when ggml is not installed, or not as this machine's processor needs it."""

    code = "ggml_unavailable"


class NotWritable(StartError):
    """Raised when the folder of the cache or of a run can not be written."""

    code = "not_writable"


class PortInUse(StartError):
    """Raised when another program listens on a port that a service needs."""

    code = "port_in_use"


class RequestError(NoodleError):
    """Base of all that the client can cure."""

    http_status = 400
    code = "invalid_request"
    error_type = "invalid_request_error"


class InvalidRequest(RequestError):
    """Raised when a request's body or a parameter is wrong."""


class ContextTooLong(InvalidRequest):
    """Raised when prompt and max_tokens together pass the context length."""

    code = "context_length_exceeded"


class NotAuthenticated(RequestError):
    """Raised when a key or token is missing or wrong."""

    http_status = 401
    code = "invalid_api_key"
    error_type = "authentication_error"


class NotFound(RequestError):
    """Raised when a route, model or request does not exist."""

    http_status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """Raised when a request asks for a model that this cluster does not serve."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """Raised when a route exists, but not for this method."""

    http_status = 405
    code = "method_not_allowed"


class RequestTooSlow(RequestError):
    """Raised when the head or body of a request did not come in its time."""

    http_status = 408
    code = "request_too_slow"


class Conflict(RequestError):
    """Raised when the request contradicts what is already there."""

    http_status = 409
    code = "conflict"


class Gone(RequestError):
    """Raised when what is asked for was here, and will not come back."""

    http_status = 410
    code = "gone"


class BodyTooLarge(RequestError):
    """Raised when a body passes the route's limit."""

    http_status = 413
    code = "body_too_large"


class UnsupportedMediaType(RequestError):
    """Raised when the body is not declared as what the route reads."""

    http_status = 415
    code = "unsupported_media_type"


class Unprocessable(RequestError):
    """Raised when a well-formed request can not be computed."""

    http_status = 422
    code = "unprocessable"


class TooManyRequests(RequestError):
    """Raised when as many requests wait as may."""

    http_status = 429
    code = "rate_limit_exceeded"
    error_type = "rate_limit_error"


class NotReady(NoodleError):
    """Raised while the cluster can not answer yet."""

    http_status = 503
    code = "not_ready"


class GenerationFailed(NoodleError):
    """Raised when a request that had begun can not be finished."""

    code = "generation_failed"


class RequestTimedOut(NoodleError):
    """Raised when a named wait ran out."""

    http_status = 504
    code = "timed_out"


class WireError(NoodleError):
    """Raised when bytes from the wire are not a frame of ours."""

    http_status = 400
    code = "bad_frame"


class FrameTooLarge(WireError):
    """Raised when a frame says it is larger than its route allows."""

    http_status = 413
    code = "frame_too_large"


class StepRefused(NoodleError):
    """Raised when a stage must not compute a step; `reason` is one short code that is also a metric label."""

    http_status = 409
    code = "step_refused"

    def __init__(self, message: str, *, reason: str, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.reason = reason


class PositionGap(StepRefused):
    """Raised when tokens before a step's first position never came in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="position_gap")


class LinkLost(NoodleError):
    """Raised when the connection to the next process is gone."""

    code = "link_lost"


class QueueUnavailable(NoodleError):
    """Raised when Valkey does not answer or refuses to store."""

    http_status = 503
    code = "queue_unavailable"
