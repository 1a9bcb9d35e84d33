"""Machines as a user lists them, previews for them, and the explanation if they do not hold the model."""

import json

import msgspec
import pytest

from noodle.errors import InvalidRequest, MemoryShort, NotReady, Unprocessable
from services.planner.memory_shortage import explain_shortage
from services.planner.node_list import (
    BYTES_PER_GIGABYTE,
    MAXIMUM_NODES,
    Node,
    PlanRequest,
    machines_of,
    parse_plan_request,
)
from services.planner.partition import USABLE_SHARE, partition
from services.planner.preview import preview
from tests.unit.planner.test_partition import a_machine, a_shape

GUIDE = [
    {"node_id": "rtx1050", "device_type": "cuda", "vram_gb": 4},
    {"node_id": "pc", "device_type": "cpu", "ram_gb": 16},
]
SHAPE = a_shape((40_000_000,) * 12, embedding_bytes=50_000_000, head_bytes=50_000_000, kv_items_per_token_per_layer=100)


def request_of(value):
    return parse_plan_request(json.dumps(value).encode())[0]


def nodes_of(*nodes):
    return request_of(list(nodes)).available_nodes


def test_a_bare_list_an_object_and_an_empty_body_are_accepted():
    nodes = tuple(Node(**node) for node in GUIDE)
    assert request_of(GUIDE) == request_of({"available_nodes": GUIDE}) == PlanRequest(available_nodes=nodes)
    assert parse_plan_request(b"") == (PlanRequest(), [])
    assert request_of({}) == PlanRequest()
    assert request_of({"available_nodes": GUIDE, "split": [10, 2], "model": "gpt2"}).split == (10, 2)


def test_fields_that_are_not_used_are_named():
    body = {"available_nodes": [{**GUIDE[0], "ip": "192.168.1.101"}, GUIDE[1]], "model": "gpt2"}
    assert parse_plan_request(json.dumps(body).encode())[1] == ["model", "available_nodes[0].ip"]


@pytest.mark.parametrize(
    "body", [b"{", b"5", b"null", b'{"available_nodes": 5}', b'{"split": "10,2"}', b"[" * 100_000, b"\xff", b"[]"]
)
def test_a_malformed_body_is_refused(body):
    with pytest.raises(InvalidRequest):
        parse_plan_request(body)


def test_memory_is_as_listed_and_speed_is_assumed():
    listed = machines_of(nodes_of(*GUIDE), SHAPE, [])
    card, pc = (each.report for each in listed)
    assert (card.device, card.dtype, card.free_bytes) == ("cuda", "float16", 4 * BYTES_PER_GIGABYTE)
    assert (pc.device, pc.dtype, pc.free_bytes) == ("cpu", "float32", 16 * BYTES_PER_GIGABYTE)
    assert card.decode_layer_seconds < pc.decode_layer_seconds
    assert all(each.report.source == "assumed" for each in listed)
    assert all(each.memory_source == "configured" for each in listed)


@pytest.mark.parametrize("name", ["machine-1", "1", 1, "stage-1"])
def test_a_node_that_names_a_registered_machine_has_its_measured_speed(name):
    registered = [a_machine(0), a_machine(1, decode_layer_seconds=0.123, free_bytes=777, layer_weight_bytes=9.0)]
    (machine,) = machines_of(nodes_of({"node_id": name, "device_type": "cpu"}), SHAPE, registered)
    assert (machine.report.decode_layer_seconds, machine.report.source) == (0.123, "measured")
    assert (machine.report.free_bytes, machine.memory_source) == (777, "measured")
    # no speed and no size of weights is measured in another number format
    (other,) = machines_of(nodes_of({"node_id": name, "device_type": "cpu", "dtype": "bfloat16"}), SHAPE, registered)
    assert other.report.source == "assumed"
    assert other.report.decode_layer_seconds != 0.123
    assert other.report.layer_weight_bytes == 0.0
    # or on another device
    (card,) = machines_of(nodes_of({"node_id": name, "device_type": "gpu", "vram_gb": 2}), SHAPE, registered)
    assert card.report.source == "assumed"


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        ({}, InvalidRequest),
        ({"node_id": "a"}, InvalidRequest),
        ({"node_id": "a", "device_type": "cpu"}, InvalidRequest),
        ({"node_id": "a", "device_type": "cpu", "ram_gb": 0}, InvalidRequest),
        ({"node_id": "a", "device_type": "cpu", "ram_gb": 1e300}, InvalidRequest),
        ({"node_id": "a", "device_type": "cpu", "ram_gb": "16"}, InvalidRequest),
        ({"node_id": [], "device_type": "cpu", "ram_gb": 16}, InvalidRequest),
        ({"node_id": "a", "device_type": "mps", "ram_gb": 16}, Unprocessable),
        ({"node_id": "a", "device_type": "cpu", "ram_gb": 16, "dtype": "int2"}, Unprocessable),
    ],
)
def test_a_malformed_node_is_refused_by_name(node, kind):
    with pytest.raises(kind) as refusal:
        machines_of(nodes_of(node), SHAPE, [])
    assert refusal.value.param.startswith("available_nodes[0]")


def test_a_preview_marks_every_number_and_adds_up():
    status, answer = preview(request_of(GUIDE), SHAPE, [])
    assert (status, answer["success"]) == (200, True)
    plan = answer["plan"]
    assert plan["stages"][0]["start_layer"] == 0
    assert plan["stages"][-1]["end_layer"] == SHAPE.layer_count
    for stage in plan["stages"]:
        assert stage["memory_left_bytes"] == pytest.approx(
            stage["usable_bytes"] - stage["weight_bytes"] - stage["kv_bytes"], abs=2
        )
        assert set(stage["sources"]) <= set(stage)
    spent = sum(stage["decode_seconds"] for stage in plan["stages"]) + 3 * plan["prediction"]["hop_seconds"]
    assert plan["prediction"]["token_seconds"] == pytest.approx(spent)
    assert plan["prediction"]["source"] == "assumed"


def test_a_preview_without_nodes_is_for_the_registered_machines_and_knows_the_active_plan():
    machines = [a_machine(0), a_machine(1)]
    active = msgspec.structs.replace(partition(SHAPE, machines, (5, 7), kv_tokens=2048), version=4)
    _, answer = preview(PlanRequest(), SHAPE, machines, split=(5, 7), active=active)
    assert (answer["plan"]["is_active"], answer["plan"]["active_version"]) == (True, 4)
    _, answer = preview(PlanRequest(), SHAPE, machines, active=active)
    assert answer["plan"]["is_active"] is False
    with pytest.raises(NotReady):
        preview(PlanRequest(), SHAPE, [])


def short_machines(*usable_bytes):
    return [a_machine(index, free_bytes=int(count / USABLE_SHARE) + 1) for index, count in enumerate(usable_bytes)]


def test_the_missing_bytes_are_named_and_every_cure_works():
    machines = short_machines(150_000_000, 120_000_000)
    kv_tokens = 2048
    with pytest.raises(MemoryShort):
        partition(SHAPE, machines, None, kv_tokens=kv_tokens)
    short = explain_shortage(SHAPE, machines, None, kv_tokens)
    assert short.short_bytes == sum(memory.short_bytes for memory in short.memories) > 0
    for memory in short.memories:
        assert memory.short_bytes == memory.needed_bytes - memory.usable_bytes > 0
    values = {cure.kind: cure.value for cure in short.cures}

    def fits(machines, shape=SHAPE, kv_tokens=kv_tokens):
        return bool(partition(shape, machines, None, kv_tokens=kv_tokens).stages)

    freed = {memory.machine: memory.short_bytes for memory in short.memories}
    assert fits(short_machines(*(150e6 + freed.get("machine-0", 0), 120e6 + freed.get("machine-1", 0))))
    assert fits([*machines, a_machine(2, free_bytes=values["another_machine"])])
    with pytest.raises(MemoryShort):
        fits([*machines, a_machine(2, free_bytes=int(values["another_machine"] * 0.98))])
    stored = sum(SHAPE.layer_bytes) + SHAPE.embedding_bytes + SHAPE.head_bytes
    factor = values["smaller_model"] / stored
    smaller = a_shape(
        tuple(int(count * factor) for count in SHAPE.layer_bytes),
        embedding_bytes=int(SHAPE.embedding_bytes * factor),
        head_bytes=int(SHAPE.head_bytes * factor),
        kv_items_per_token_per_layer=100,
    )
    assert fits(machines, smaller)
    assert "fewer_bits" not in values  # half of the weights is still too much


def test_fewer_bits_and_a_shorter_context_are_named_only_if_they_help():
    machines = short_machines(310_000_000, 300_000_000)
    for kv_items, is_enough in ((3_000, True), (10_000, False)):
        shape = a_shape((40_000_000,) * 12, kv_items_per_token_per_layer=kv_items)
        cures = {cure.kind: cure for cure in explain_shortage(shape, machines, None, 4096).cures}
        assert ("fewer_bits" in cures) == is_enough
        tokens = cures["shorter_context"].value
        assert partition(shape, machines, None, kv_tokens=tokens)
        with pytest.raises(MemoryShort):
            partition(shape, machines, None, kv_tokens=tokens + 1)
        assert "NOODLE_DTYPE=bfloat16" in cures.get("fewer_bits", cures["shorter_context"]).text or not is_enough


def test_a_split_that_does_not_fit_names_the_cut_that_would():
    machines = short_machines(560_000_000, 300_000_000)
    with pytest.raises(MemoryShort):
        partition(SHAPE, machines, (2, 10), kv_tokens=0)
    short = explain_shortage(SHAPE, machines, (2, 10), 0)
    assert [memory.machine for memory in short.memories] == ["machine-1"]
    assert "no_split" in {cure.kind for cure in short.cures}


def test_the_maximum_of_nodes_is_planned_for_quickly():
    shape = a_shape((1000,) * 96)
    nodes = [{"node_id": number, "device_type": "cpu", "ram_gb": 1e-6} for number in range(MAXIMUM_NODES)]
    status, answer = preview(request_of(nodes), shape, [])
    assert status == 422
    assert answer["short"].short_bytes > 0
