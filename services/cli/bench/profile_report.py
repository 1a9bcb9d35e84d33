"""A report of `noodle profile`: what was measured, its conditions, and what a reader must be told; values only."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from noodle.cluster.measuring import DecodePoint, DeviceProfile, MachineProfile, PrefillPoint
from noodle.cluster.reports import ReportHead
from services.cli.bench.report import was_busy


class ProfileConditions(Struct, frozen=True):
    """What the figures hold for beside what the profile itself says."""

    noodle_version: str
    is_quick: bool
    step_tokens: int
    load_average: float | None  # of the last minute, before the start
    noodle_runs_here: bool  # a `noodle up` of this state folder, idle or not


class ProfileReport(ReportHead, frozen=True, kw_only=True):
    """The whole report."""

    kind: Literal["profile"] = "profile"
    conditions: ProfileConditions
    profile: MachineProfile
    remarks: tuple[str, ...]


def headline(profile: MachineProfile) -> str:
    """The report in a line of a list."""
    parts = []
    for device in profile.devices:
        decode, prefill = decode_alone(device), prefill_alone(device)
        if decode is not None and prefill is not None:
            parts.append(
                f"{device.device} {device.dtype}: a layer {decode.layer_seconds * 1e3:.2f} ms a token, "
                f"{prefill.layer_seconds / prefill.chunk_tokens * 1e3:.3f} in prefill"
            )
    return "; ".join(parts)[:200]


def remarks(conditions: ProfileConditions, profile: MachineProfile) -> tuple[str, ...]:
    """What makes the figures doubtful, in sentences; those that hold."""
    said = list(profile.notes)
    if was_busy(conditions.load_average, profile.cores):
        said.append(
            f"This machine was not idle before the start (a load of {conditions.load_average:.1f} on "
            f"{profile.cores} cores): the figures are not to be trusted."
        )
    if conditions.noodle_runs_here:
        said.append("A noodle runs on this machine: what it computed and held meanwhile was not to be had.")
    return tuple(said)


def decode_alone(device: DeviceProfile, kv_tokens: int = 128) -> DecodePoint | None:
    """A decode of one session with the most threads, near so many rows."""
    points = [point for point in device.threads[0].decode if point.sessions == 1]
    return min(points, key=lambda point: abs(point.kv_tokens - kv_tokens)) if points else None


def prefill_alone(device: DeviceProfile, chunk_tokens: int = 128) -> PrefillPoint | None:
    """A prefill of one session with the most threads, near so many tokens."""
    points = [point for point in device.threads[0].prefill if point.sessions == 1]
    return min(points, key=lambda point: abs(point.chunk_tokens - chunk_tokens)) if points else None
