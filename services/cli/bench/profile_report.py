"""The report of `noodle profile`: the measurements, their conditions, remarks for the reader, and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from noodle.cluster.measuring import DecodePoint, DeviceProfile, MachineProfile, PartPoint, PrefillPoint, ThreadsProfile
from noodle.cluster.reports import ReportHead
from services.cli.bench.report import was_busy
from services.cli.client.reports import counted, print_table


class ProfileConditions(Struct, frozen=True):
    """The conditions that the profile itself does not have."""

    noodle_version: str
    is_quick: bool
    step_tokens: int
    load_average: float | None  # of the last minute before the start
    noodle_runs_here: bool  # a `noodle up` of this state folder, even if idle


class ProfileReport(ReportHead, frozen=True, kw_only=True):
    """The whole report."""

    kind: Literal["profile"] = "profile"
    conditions: ProfileConditions
    profile: MachineProfile
    remarks: tuple[str, ...]


def headline(profile: MachineProfile) -> str:
    """Return the report in one line, for a list."""
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
    """Return what makes the figures unreliable, one sentence each."""
    texts = list(profile.notes)
    if was_busy(conditions.load_average, profile.cores):
        texts.append(
            f"This machine was not idle before the start (a load of {conditions.load_average:.1f} on "
            f"{profile.cores} cores): the figures are unreliable."
        )
    if conditions.noodle_runs_here:
        texts.append("`noodle up` runs on this machine: its computing and its memory reduce the figures.")
    return tuple(texts)


def decode_alone(device: DeviceProfile, kv_tokens: int = 128) -> DecodePoint | None:
    """Return a decode of one session with the most threads, near `kv_tokens` rows."""
    points = [point for point in device.threads[0].decode if point.sessions == 1]
    return min(points, key=lambda point: abs(point.kv_tokens - kv_tokens)) if points else None


def prefill_alone(device: DeviceProfile, chunk_tokens: int = 128) -> PrefillPoint | None:
    """Return a prefill of one session with the most threads, near `chunk_tokens`."""
    points = [point for point in device.threads[0].prefill if point.sessions == 1]
    return min(points, key=lambda point: abs(point.chunk_tokens - chunk_tokens)) if points else None


def print_report(report: ProfileReport) -> None:
    profile = report.profile
    print(
        f"{report.model or profile.model_type} on {report.machine}, {report.made_at}: {profile.layer_count} layers of "
        f"{profile.model_type}, hidden size {profile.hidden_size}, vocabulary {profile.vocab_size}; "
        f"{profile.cores} cores, {profile.executor_version}."
    )
    for device in profile.devices:
        _print_device(device, profile.layer_count)
    for remark in report.remarks:
        print(f"- {remark}")


def _print_device(device: DeviceProfile, layer_count: int) -> None:
    print()
    print(f"{device.device} ({device.device_name}), {device.dtype} ({device.dtype_reason})")
    print(
        f"free memory {device.free_bytes / 1e9:.2f} GB ({device.free_source}); a layer's weights "
        f"{device.layer_bytes / 1e6:.1f} MB (all {layer_count}: {device.layer_bytes * layer_count / 1e9:.2f} GB), "
        f"its KV rows {device.kv_bytes_per_token / 1e3:.1f} kB a token"
    )
    for threads in device.threads:
        print()
        _print_threads(threads)


def _print_threads(threads: ThreadsProfile) -> None:
    name = counted(threads.threads, "thread")
    decode = {(point.kv_tokens, point.sessions): point.layer_seconds for point in threads.decode}
    prefill = {(point.chunk_tokens, point.sessions): point.layer_seconds for point in threads.prefill}
    if decode:
        print(f"{name}, decode: milliseconds a layer for one token of each session")
        _print_grid("KV tokens", decode)
    if prefill:
        print(f"{name}, prefill: milliseconds a layer for a chunk of each session")
        _print_grid("chunk tokens", prefill)
    for part, unit, points in (("embedding", "tokens", threads.embedding), ("head", "rows", threads.head)):
        if points:
            print(f"{name}, {part}: {', '.join(_part(point, unit) for point in points)}")


def _print_grid(row_title: str, seconds: Mapping[tuple[int, int], float]) -> None:
    columns = sorted({sessions for _, sessions in seconds})
    titles = (row_title, *(counted(sessions, "session") for sessions in columns))
    rows = []
    for length in sorted({length for length, _ in seconds}):
        row = [seconds.get((length, sessions)) for sessions in columns]
        rows.append((str(length), *("" if each is None else f"{each * 1e3:.3f}" for each in row)))
    print_table(titles, rows, right=titles)


def _part(point: PartPoint, unit: str) -> str:
    unit = unit.removesuffix("s") if point.tokens == 1 else unit
    shown = f"{point.seconds * 1e3:.3f} ms" if point.seconds else "less than the noise of a step"
    return f"{point.tokens} {unit} {shown}"
