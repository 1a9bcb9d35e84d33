"""Machines as a user lists them for a plan that is only looked at: `[{node_id, device_type, vram_gb or ram_gb}]`.

What was not measured is assumed, and said to be; a node that names a registered machine has that one's measured speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from noodle.cluster.plan import MachineReport, ModelShape, Source
from noodle.errors import InvalidRequest, Unprocessable
from services.planner.partition import DTYPE_BYTES

MAXIMUM_NODES = 64
BYTES_PER_GIGABYTE = 1_000_000_000  # a card of "4 GB" holds a little more; the lower reading plans with less
DEVICE_TYPES = {"cuda": "cuda", "gpu": "cuda", "cpu": "cpu"}

# Assumed until a machine has measured: a decode token reads every weight once, so memory sets its pace, and a prompt's
# tokens share that reading, so arithmetic sets theirs. The card is a GTX 1050 by its data sheet (112 GB/s, 1.86
# TFLOP/s), the CPU two channels of DDR4-2400 (38 GB/s) and four cores with AVX2; half of each is thought to be reached.
ASSUMED_BYTES_PER_SECOND = {"cuda": 56e9, "cpu": 19e9}
ASSUMED_OPERATIONS_PER_SECOND = {"cuda": 0.9e12, "cpu": 0.1e12}
ASSUMED_LAYER_SECONDS = {"cuda": 0.0004, "cpu": 0.0003}  # of starting a layer's operations, whatever its size
ASSUMED_DTYPES = {"cuda": "float16", "cpu": "float32"}


Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Split = Annotated[tuple[Layers, ...], msgspec.Meta(min_length=1, max_length=MAXIMUM_NODES)]


class Node(msgspec.Struct, frozen=True):
    """One machine of a list; further fields are named in the answer as not used."""

    node_id: str | int
    device_type: str
    vram_gb: float | None = None
    ram_gb: float | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """A machine as the planner takes it, and where its numbers come from; by field of MachineReport."""

    report: MachineReport
    sources: dict[str, Source]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned: nodes as they came, None for the machines that are registered."""

    nodes: list[dict[str, Any]] | None = None
    split: tuple[int, ...] | None = None
    context_length: int | None = None
    not_used: list[str] = field(default_factory=list)


def parse_plan_request(body: bytes) -> PlanRequest:
    """A bare list of nodes, `{available_nodes, split, context_length}`, or nothing; raises InvalidRequest."""
    if not body.strip():
        return PlanRequest()
    try:
        value = msgspec.json.decode(body)
    except (RecursionError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"The body is not JSON: {str(error)[:200]}.") from error
    fields = {"available_nodes": value} if isinstance(value, list) else value
    if not isinstance(fields, dict):
        raise InvalidRequest(
            "The body is neither a list of nodes nor an object.", cure="Send available_nodes, or nothing."
        )
    nodes = fields.get("available_nodes")
    if nodes is not None and not (isinstance(nodes, list) and all(isinstance(node, dict) for node in nodes)):
        raise InvalidRequest("available_nodes is not a list of objects.", param="available_nodes")
    if nodes is not None and not 1 <= len(nodes) <= MAXIMUM_NODES:
        raise InvalidRequest(
            f"available_nodes names {len(nodes)} nodes, and 1 to {MAXIMUM_NODES} can be planned for.",
            cure="Leave it out to plan for the machines that are registered.",
            param="available_nodes",
        )
    known = {"available_nodes", "split", "context_length"}
    return PlanRequest(
        nodes,
        _converted(fields.get("split"), Split | None, "split"),
        _converted(fields.get("context_length"), Tokens | None, "context_length"),
        _named(sorted(fields.keys() - known)),
    )


def read_nodes(
    nodes: Sequence[dict[str, Any]], shape: ModelShape, registered: Sequence[MachineReport]
) -> tuple[list[Given], list[str]]:
    """The listed machines in their order, which is that of the stages, and the names of fields that were not used."""
    given: list[Given] = []
    not_used: list[str] = []
    names: set[str] = set()
    for index, fields in enumerate(nodes):
        node = _converted(fields, Node, f"available_nodes[{index}]")
        name = str(node.node_id)[:100]
        if name in names:
            raise InvalidRequest(f"Two nodes are called {name!r}.", param=f"available_nodes[{index}].node_id")
        names.add(name)
        unknown = sorted(str(field) for field in fields.keys() - set(Node.__struct_fields__))
        not_used += _named([f"available_nodes[{index}].{field}" for field in unknown])
        given.append(_given(node, name, index, shape, registered))
    return given, not_used[:MAXIMUM_NODES]


def _given(node: Node, name: str, index: int, shape: ModelShape, registered: Sequence[MachineReport]) -> Given:
    where = f"available_nodes[{index}]"
    device = DEVICE_TYPES.get(node.device_type.lower())
    if device is None:
        raise Unprocessable(
            f"Node {name!r} has the device type {node.device_type[:40]!r}.",
            cure=f"noodle computes on {' or '.join(DEVICE_TYPES)}.",
            param=f"{where}.device_type",
        )
    measured = next((it for it in registered if it.device == device and _is_named(it, name)), None)
    dtype = node.dtype or (measured.dtype if measured else ASSUMED_DTYPES[device])
    if dtype not in DTYPE_BYTES:
        raise Unprocessable(
            f"Node {name!r} is to compute in {dtype[:40]!r}.",
            cure=f"Choose one of {', '.join(DTYPE_BYTES)}.",
            param=f"{where}.dtype",
        )
    gigabytes = node.vram_gb if device == "cuda" else node.ram_gb
    field_name = "vram_gb" if device == "cuda" else "ram_gb"
    if gigabytes is None and measured is None:
        raise InvalidRequest(f"Node {name!r} has no {field_name}.", param=f"{where}.{field_name}")
    if gigabytes is not None and not 0 < gigabytes <= 1e6:
        raise InvalidRequest(f"Node {name!r} has a {field_name} of {gigabytes:g}.", param=f"{where}.{field_name}")
    assumed = _assumed(name, index, device, dtype, shape)
    memory = round(gigabytes * BYTES_PER_GIGABYTE) if gigabytes is not None else 0
    sources: dict[str, Source] = {
        "free_bytes": "configured" if gigabytes is not None else "measured",
        "dtype": "configured" if node.dtype else "measured" if measured else "assumed",
        "decode_layer_seconds": "assumed",
        "prefill_layer_seconds_per_token": "assumed",
        "head_decode_seconds": "assumed",
    }
    if measured is None:
        return Given(msgspec.structs.replace(assumed, free_bytes=memory), sources)
    report = msgspec.structs.replace(
        measured, stage_id=index, machine=name, dtype=dtype, free_bytes=memory or measured.free_bytes
    )
    if dtype == measured.dtype:
        return Given(report, sources | dict.fromkeys(SPEEDS, measured.source))
    speeds = {field: getattr(assumed, field) for field in SPEEDS}
    return Given(msgspec.structs.replace(report, source="assumed", **TRANSFORMERS, **speeds), sources)


# of a machine that is to compute in a dtype, and not as it has chosen
TRANSFORMERS: dict[str, Any] = {
    "executor": "transformers",
    "weights": "",
    "kv_dtype": "",
    "quality": None,
    "choice": "",
}
SPEEDS = (
    "decode_layer_seconds",
    "prefill_layer_seconds_per_token",
    "head_decode_seconds",
    "batched_layer_seconds",
    "batched_head_seconds",
)


def _is_named(report: MachineReport, name: str) -> bool:
    return name in (report.machine, str(report.stage_id), f"stage-{report.stage_id}")


def _assumed(name: str, stage_id: int, device: str, dtype: str, shape: ModelShape) -> MachineReport:
    """A machine that nobody measured."""
    item_bytes = DTYPE_BYTES[dtype]
    layer_items = sum(shape.layer_bytes) / shape.layer_count / shape.stored_item_bytes
    head_items = shape.head_bytes / shape.stored_item_bytes
    pace = ASSUMED_BYTES_PER_SECOND[device]
    return MachineReport(
        stage_id=stage_id,
        machine=name,
        url="",
        boot_id="",
        noodle_version="",
        model_digest=shape.digest,
        device=device,
        device_name="",
        dtype=dtype,
        threads=0,
        free_bytes=0,
        decode_layer_seconds=ASSUMED_LAYER_SECONDS[device] + layer_items * item_bytes / pace,
        prefill_layer_seconds_per_token=2 * layer_items / ASSUMED_OPERATIONS_PER_SECOND[device],
        head_decode_seconds=head_items * item_bytes / pace,
        source="assumed",
    )


def _converted(value: Any, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name}: {str(error)[:200]}.", param=name) from error


def _named(names: Sequence[str]) -> list[str]:
    return [name[:80] for name in names[:MAXIMUM_NODES]]
