"""Chooses the number format of hidden states on each hop from the measured links; pure: numbers in, a format out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from noodle.cluster.plan import MachineReport
from noodle.wire.frames import row_bytes

# Of a prompt token's seconds at the slowest stage or on the hop. Where more than this is the hop's, 16 bits are worth
# what they cost (measured on the default model: perplexity times 1.00002). A prompt's tokens decide: they are computed
# together and cost as many bytes as any; to a single new token the bytes are nothing beside the way there.
HOP_SHARE = 0.1
SIXTEEN_BITS = "float16"


@dataclass(frozen=True, slots=True)
class Hop:
    """How hidden states go from one stage to the next."""

    dtype: str
    prefill_dtype: str  # empty: the same
    token_seconds: float  # of one prompt token's bytes on the way; 0 where the link is not measured


def choose_hop(
    wanted: str,
    is_exact: bool,
    sender: MachineReport,
    receiver: MachineReport,
    hidden_size: int,
    slowest_prefill_seconds: float,
) -> Hop:
    """The hop from `sender` to `receiver`; `wanted` is NOODLE_HOP_DTYPE.

    `slowest_prefill_seconds` is what the slowest stage of the plan computes on one token of a prompt.
    """
    link = link_bytes_per_second(sender, receiver)
    if is_exact:
        chosen, prefill = "float32", ""
    elif wanted == "int8":
        chosen, prefill = SIXTEEN_BITS if sender.dtype == "float32" else sender.dtype, "int8"
    elif wanted != "auto":
        chosen, prefill = wanted, ""
    else:
        chosen, prefill = sender.dtype, ""
        seconds = row_bytes(chosen, hidden_size) / link if link else 0.0
        if chosen == "float32" and seconds > HOP_SHARE * max(slowest_prefill_seconds, seconds):
            chosen = SIXTEEN_BITS
    seconds = row_bytes(prefill or chosen, hidden_size) / link if link else 0.0
    return Hop(chosen, prefill, seconds)


def link_bytes_per_second(sender: MachineReport, receiver: MachineReport) -> float:
    """Of the slower of the two machines' links; 0 within one machine, and where none was measured."""
    if sender.machine == receiver.machine:
        return 0.0
    measured = [each.link_bytes_per_second for each in (sender, receiver) if each.link_bytes_per_second > 0]
    return min(measured, default=0.0)


def choose_hops(
    wanted: str, is_exact: bool, machines: Sequence[MachineReport], hidden_size: int, slowest_prefill_seconds: float
) -> list[Hop]:
    """One for each stage but the last, in pipeline order."""
    return [
        choose_hop(wanted, is_exact, sender, receiver, hidden_size, slowest_prefill_seconds)
        for sender, receiver in pairwise(machines)
    ]
