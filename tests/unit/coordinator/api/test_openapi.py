"""The OpenAPI document is the app: no route without its operation, no field without its place in a schema."""

import pytest
from prometheus_client import CollectorRegistry

from noodle.config.environment import coordinator_config
from noodle.metrics.counted import CoordinatorMetrics
from services.coordinator.api import generate_format, openai_fields
from services.coordinator.api.openapi import ERROR, ERROR_TEXTS, OPENAPI, document
from services.coordinator.app import OPERATIONS, create_app
from services.coordinator.coordinator import Coordinator

TOKEN = "a-token-of-some-length"
IMPLICIT = {"HEAD", "OPTIONS"}


@pytest.fixture(scope="module")
def app():
    config = coordinator_config({"NOODLE_CLUSTER_TOKEN": TOKEN})
    registry = CollectorRegistry()
    return create_app(config, Coordinator(config, CoordinatorMetrics(registry)), registry)


def untyped(rule):
    return rule.replace("<path:", "<").replace("<int:", "<")


def test_every_route_has_its_operation_and_every_operation_its_route(app):
    routes = {
        (method.lower(), untyped(rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.endpoint != "static"
        for method in rule.methods - IMPLICIT
    }
    assert routes == {(operation.method, operation.flask_rule) for operation in (*OPERATIONS, OPENAPI)}


def test_the_document_is_what_the_route_sends(app):
    sent = app.test_client().get("/openapi.json").get_json()
    assert sent == document(OPERATIONS)
    assert sent["openapi"] == "3.1.0"


def properties(path):
    body = document(OPERATIONS)["paths"][path]["post"]["requestBody"]
    return body["content"]["application/json"]["schema"]["properties"]


def test_every_field_that_a_request_may_have_is_described():
    assert set(properties("/v1/chat/completions")) == (
        openai_fields.CHAT_HONOURED | openai_fields.HARMLESS | set(openai_fields.CHAT_NEUTRAL)
    )
    assert set(properties("/v1/completions")) == (
        openai_fields.COMPLETION_HONOURED | openai_fields.HARMLESS | set(openai_fields.COMPLETION_NEUTRAL)
    )
    assert set(properties("/generate")["parameters"]["properties"]) == (
        generate_format.HONOURED | set(generate_format.NEUTRAL)
    )


def test_every_error_has_its_text_and_the_shape_of_openais():
    for path, methods in document(OPERATIONS)["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                assert answer["description"], (method, path, status)
                if int(status) < 400 or path == "/health":
                    continue
                schema = answer["content"]["application/json"]["schema"]
                if "$ref" in schema:
                    assert schema == {"$ref": "#/components/schemas/Error"}
                    assert answer["description"] == ERROR_TEXTS[int(status)]
                else:  # the guide's say `success` beside it
                    assert schema["properties"] == {**ERROR["properties"], "success": {"const": False}}


def test_operations_have_names_of_their_own():
    names = [
        operation["operationId"] for methods in document(OPERATIONS)["paths"].values() for operation in methods.values()
    ]
    assert len(names) == len(set(names))
