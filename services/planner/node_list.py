"""Parse the machines a user lists for a preview: `[{node_id, device_type, vram_gb or ram_gb}]`.

Numbers that nobody measured are assumed and marked so; a node that names a registered machine gets its measured speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from noodle.cluster.plan import MachineReport, ModelShape, Source
from noodle.errors import InvalidRequest, Unprocessable
from services.planner.partition import DTYPE_BYTES

MAXIMUM_NODES = 64
MAXIMUM_NAME_CHARACTERS = 100
BYTES_PER_GIGABYTE = 1_000_000_000  # a card of "4 GB" holds a little more; the lower reading plans with less
DEVICE_TYPES = {"cuda": "cuda", "gpu": "cuda", "cpu": "cpu"}

# Assumed until a machine has measured: a decode token reads every weight once, so memory bandwidth sets its pace; a
# prompt's tokens share that reading, so arithmetic sets theirs. The card is a GTX 1050 by its data sheet (112 GB/s,
# 1.86 TFLOP/s), the CPU two channels of DDR4-2400 (38 GB/s) and four cores with AVX2; half of each is assumed reached.
ASSUMED_BYTES_PER_SECOND = {"cuda": 56e9, "cpu": 19e9}
ASSUMED_OPERATIONS_PER_SECOND = {"cuda": 0.9e12, "cpu": 0.1e12}
ASSUMED_LAYER_SECONDS = {"cuda": 0.0004, "cpu": 0.0003}  # to start a layer's operations, whatever its size
ASSUMED_DTYPES = {"cuda": "float16", "cpu": "float32"}

# fields that are assumed of a measured machine too if it is to compute in another dtype than it chose itself
ASSUMED_WITH_DTYPE = (
    "source",
    "executor",
    "weights",
    "layer_weight_bytes",
    "kv_dtype",
    "choice",
    "other_formats",
    "decode_layer_seconds",
    "prefill_layer_seconds_per_token",
    "head_decode_seconds",
    "batched_layer_seconds",
    "batched_head_seconds",
)

Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Node(msgspec.Struct, frozen=True):
    """One listed machine."""

    node_id: str | int
    device_type: str
    vram_gb: float | None = None
    ram_gb: float | None = None
    dtype: str | None = None


class PlanRequest(msgspec.Struct, frozen=True):
    """What to plan; without nodes, the registered machines."""

    available_nodes: Annotated[tuple[Node, ...], msgspec.Meta(min_length=1, max_length=MAXIMUM_NODES)] | None = None
    split: Annotated[tuple[Layers, ...], msgspec.Meta(min_length=1, max_length=MAXIMUM_NODES)] | None = None
    context_length: Tokens | None = None


@dataclass(frozen=True, slots=True)
class ListedMachine:
    """A machine to plan for, and where its numbers come from; `report.source` is the source of its speeds."""

    report: MachineReport
    memory_source: Source
    dtype_source: Source


def parse_plan_request(body: bytes) -> tuple[PlanRequest, list[str]]:
    """Parse a bare list of nodes, an object, or nothing. Also returns the names of fields that are not used.

    Raises InvalidRequest.
    """
    if not body.strip():
        return PlanRequest(), []
    try:
        value = msgspec.json.decode(body)
        fields = {"available_nodes": value} if isinstance(value, list) else value
        request = msgspec.convert(fields, PlanRequest)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        raise InvalidRequest(
            f"{field or 'The body'}: {problem[:200]}.",
            cure=f"Send a list of 1 to {MAXIMUM_NODES} nodes, or an object with available_nodes, split and "
            "context_length. Without available_nodes, the registered machines are planned for.",
            param=field or None,
        ) from error
    except (RecursionError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"The body is not JSON: {str(error)[:200]}.") from error
    return request, _unused_fields(fields)[:MAXIMUM_NODES]


def _unused_fields(fields: dict[str, Any]) -> list[str]:
    unused = sorted(fields.keys() - set(PlanRequest.__struct_fields__))
    for index, node in enumerate(fields.get("available_nodes") or ()):
        unused += [f"available_nodes[{index}].{name}" for name in sorted(node.keys() - set(Node.__struct_fields__))]
    return [name[:80] for name in unused]


def machines_of(nodes: Sequence[Node], shape: ModelShape, registered: Sequence[MachineReport]) -> list[ListedMachine]:
    """The machines in the order of the list, which is the order of the stages. Raises RequestError."""
    names = [str(node.node_id)[:MAXIMUM_NAME_CHARACTERS] for node in nodes]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"Two nodes are called {name!r}.", param=f"available_nodes[{index}].node_id")
    return [_machine_of(node, index, shape, registered) for index, node in enumerate(nodes)]


def _machine_of(node: Node, index: int, shape: ModelShape, registered: Sequence[MachineReport]) -> ListedMachine:
    name, where = str(node.node_id)[:MAXIMUM_NAME_CHARACTERS], f"available_nodes[{index}]"
    device = DEVICE_TYPES.get(node.device_type.lower())
    if device is None:
        raise Unprocessable(
            f"Node {name!r} has the device type {node.device_type[:40]!r}.",
            cure=f"noodle computes on {' or '.join(DEVICE_TYPES)}.",
            param=f"{where}.device_type",
        )
    named = [each for each in registered if name in (each.machine, str(each.stage_id), f"stage-{each.stage_id}")]
    measured = next((report for report in named if report.device == device), None)
    dtype = node.dtype or (measured.dtype if measured else ASSUMED_DTYPES[device])
    if dtype not in DTYPE_BYTES:
        raise Unprocessable(
            f"Node {name!r} asks for the dtype {dtype[:40]!r}.",
            cure=f"Choose one of {', '.join(DTYPE_BYTES)}.",
            param=f"{where}.dtype",
        )
    memory_field = "vram_gb" if device == "cuda" else "ram_gb"
    gigabytes: float | None = getattr(node, memory_field)
    if gigabytes is None and measured is None:
        raise InvalidRequest(f"Node {name!r} has no {memory_field}.", param=f"{where}.{memory_field}")
    if gigabytes is not None and not 0 < gigabytes <= 1e6:
        raise InvalidRequest(f"Node {name!r} has a {memory_field} of {gigabytes:g}.", param=f"{where}.{memory_field}")
    machine = _assumed_machine(name, index, device, dtype, shape)
    if measured is not None:
        changes = {"stage_id": index, "machine": name, "dtype": dtype}
        if dtype != measured.dtype:
            changes |= {field: getattr(machine, field) for field in ASSUMED_WITH_DTYPE}
        machine = msgspec.structs.replace(measured, **changes)
    if gigabytes is not None:
        machine = msgspec.structs.replace(machine, free_bytes=round(gigabytes * BYTES_PER_GIGABYTE))
    return ListedMachine(
        machine,
        memory_source="measured" if gigabytes is None else "configured",
        dtype_source="configured" if node.dtype else "measured" if measured else "assumed",
    )


def _assumed_machine(name: str, stage_id: int, device: str, dtype: str, shape: ModelShape) -> MachineReport:
    item_bytes = DTYPE_BYTES[dtype]
    layer_items = sum(shape.layer_bytes) / shape.layer_count / shape.stored_item_bytes
    head_items = shape.head_bytes / shape.stored_item_bytes
    bytes_per_second = ASSUMED_BYTES_PER_SECOND[device]
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
        decode_layer_seconds=ASSUMED_LAYER_SECONDS[device] + layer_items * item_bytes / bytes_per_second,
        prefill_layer_seconds_per_token=2 * layer_items / ASSUMED_OPERATIONS_PER_SECOND[device],
        head_decode_seconds=head_items * item_bytes / bytes_per_second,
        source="assumed",
    )
