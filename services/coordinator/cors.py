"""Lets web pages of named origins ask the coordinator from a browser; off unless NOODLE_CORS_ORIGINS names some."""

from __future__ import annotations

from flask import Flask, Response, request

PREFLIGHT_SECONDS = 600  # that a browser may keep what it learnt
ALLOWED_HEADERS = "Authorization, Content-Type, X-Request-Id"
EXPOSED_HEADERS = "X-Request-Id, Retry-After"


def install_cors(app: Flask, origins: tuple[str, ...]) -> None:
    """Answer preflights and mark answers, for these origins alone; no cookies: a key is sent by the page itself."""
    if not origins:
        return

    @app.before_request
    def preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        return Response(status=204)  # what is allowed is said below, and only to those who may know

    @app.after_request
    def mark(response: Response) -> Response:
        response.vary.add("Origin")
        origin = request.headers.get("Origin", "")
        if not origin or (origin not in origins and "*" not in origins):
            return response
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "GET, POST"
            response.headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
            response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return response
