"""The OpenAPI document is the app: no route without its operation, no field without its place in a schema."""

import re

import pytest
from prometheus_client import CollectorRegistry

from noodle.config.environment import coordinator_config
from noodle.metrics.counted import CoordinatorMetrics
from services.coordinator.api.generate import GenerateParameters
from services.coordinator.api.openai_types import ChatBody, CompletionBody
from services.coordinator.api.openapi import ERROR_TEXTS
from services.coordinator.app import OPERATIONS, create_app, document
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
    assert routes == {(operation.method, re.sub(r"{(\w+)}", r"<\1>", operation.path)) for operation in OPERATIONS}


def test_the_document_is_what_the_route_sends(app):
    sent = app.test_client().get("/openapi.json").get_json()
    assert sent == document()
    assert sent["openapi"] == "3.1.0"


def properties(name):
    return document()["components"]["schemas"][name]["properties"]


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, GenerateParameters])
def test_every_field_that_a_request_may_have_is_described(body):
    assert set(properties(body.__name__)) == {*body.__struct_fields__, *body.HARMLESS, *body.NEUTRAL}


def test_bounds_and_null_stand_in_the_schema():
    chat = properties("ChatBody")
    assert chat["temperature"]["anyOf"] == [{"type": "number", "minimum": 0, "maximum": 2.0}, {"type": "null"}]
    assert chat["n"] == {"enum": [1, None]}
    assert chat["user"] == {}
    assert chat["messages"]["items"] == {"$ref": "#/components/schemas/Message"}
    schemas = document()["components"]["schemas"]
    assert schemas["ChatBody"]["required"] == ["messages"]
    assert not schemas["ChatBody"]["additionalProperties"]
    assert "usage" not in schemas["ChatChunk"]["required"]
    assert {"object", "choices", "seed"} <= set(schemas["ChatChunk"]["required"])


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from references(each)


def test_every_reference_has_its_schema():
    schemas = document()["components"]["schemas"]
    assert {reference.rpartition("/")[2] for reference in references(document())} <= set(schemas)


def test_every_operation_is_described():
    for operation in OPERATIONS:
        assert operation.summary
        assert operation.description.endswith("."), operation.path


def test_every_error_has_its_text_and_the_shape_of_openais():
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                assert answer["description"], (method, path, status)
                if int(status) < 400 or path == "/health":
                    continue
                schema = answer["content"]["application/json"]["schema"]
                is_guide = path in ("/log_metrics", "/plan/generate", "/stage/{stage_id}/forward")
                assert schema == {"$ref": f"#/components/schemas/{'GuideError' if is_guide else 'Error'}"}
                assert is_guide or answer["description"] == ERROR_TEXTS[int(status)]
    assert properties("GuideError") == {**properties("Error"), "success": {"const": False}}


def test_operations_have_names_of_their_own():
    names = [operation["operationId"] for methods in document()["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
