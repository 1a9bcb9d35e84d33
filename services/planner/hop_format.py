"""Choose the dtype of hidden states on each hop from the measured links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from noodle.cluster.plan import MachineReport
from noodle.wire.frames import row_bytes

# Share of a prompt token's time at the slowest stage. If the hop takes more, 16 bits are worth what they cost (measured
# on the default model: perplexity times 1.00002). Prompt tokens decide because they are computed together and cost as
# many bytes as any token; for a single new token, latency dwarfs the bytes.
HOP_SHARE = 0.1
SIXTEEN_BITS = "float16"


@dataclass(frozen=True, slots=True)
class Hop:
    """How hidden states travel from one stage to the next."""

    dtype: str
    prefill_dtype: str  # empty: the same
    token_seconds: float  # transfer time of one prompt token; 0 if the link is not measured


def choose_hops(
    wanted: str, machines: Sequence[MachineReport], *, hidden_size: int, slowest_prefill_seconds: float
) -> list[Hop]:
    """One hop for each machine but the last, in pipeline order; `wanted` is NOODLE_HOP_DTYPE.

    `slowest_prefill_seconds` is what the slowest stage of the plan computes on one prompt token.
    """
    return [
        _choose_hop(wanted, sender.dtype, link_bytes_per_second(sender, receiver), hidden_size, slowest_prefill_seconds)
        for sender, receiver in pairwise(machines)
    ]


def _choose_hop(wanted: str, computed: str, link: float, hidden_size: int, slowest_prefill_seconds: float) -> Hop:
    def token_seconds(dtype: str) -> float:
        return row_bytes(dtype, hidden_size) / link if link else 0.0

    if wanted == "int8":
        dtype = SIXTEEN_BITS if computed == "float32" else computed
        return Hop(dtype, "int8", token_seconds("int8"))
    dtype = computed if wanted == "auto" else wanted
    if wanted == "auto" and dtype == "float32":
        seconds = token_seconds(dtype)
        if seconds > HOP_SHARE * max(slowest_prefill_seconds, seconds):
            dtype = SIXTEEN_BITS
    return Hop(dtype, "", token_seconds(dtype))


def link_bytes_per_second(sender: MachineReport, receiver: MachineReport) -> float:
    """The slower of the two machines' links; 0 within one machine, and if neither link is measured."""
    if sender.machine == receiver.machine:
        return 0.0
    measured = [each.link_bytes_per_second for each in (sender, receiver) if each.link_bytes_per_second > 0]
    return min(measured, default=0.0)
