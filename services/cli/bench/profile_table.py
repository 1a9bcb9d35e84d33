"""Prints a report of `noodle profile` for people: the machine, tables by device and number of threads, remarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from noodle.cluster.measuring import DeviceProfile, PartPoint, ThreadsProfile
from services.cli.bench.profile_report import ProfileReport
from services.cli.client.reports import print_table


def print_report(report: ProfileReport) -> None:
    """The whole report on standard output."""
    profile = report.profile
    print(
        f"{report.model or profile.model_type} on {report.machine}, {report.made_at}: {profile.layer_count} layers of "
        f"{profile.model_type}, hidden size {profile.hidden_size}, vocabulary {profile.vocab_size}; "
        f"{profile.cores} cores, torch {profile.torch_version}, transformers {profile.transformers_version}."
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
    word = "thread" if threads.threads == 1 else "threads"
    decode = {(point.kv_tokens, point.sessions): point.layer_seconds for point in threads.decode}
    prefill = {(point.chunk_tokens, point.sessions): point.layer_seconds for point in threads.prefill}
    if decode:
        print(f"{threads.threads} {word}, decode: milliseconds a layer for one token of each session")
        _print_grid("KV tokens", decode)
    if prefill:
        print(f"{threads.threads} {word}, prefill: milliseconds a layer for a chunk of each session")
        _print_grid("chunk tokens", prefill)
    for name, unit, points in (("embedding", "tokens", threads.embedding), ("head", "rows", threads.head)):
        if points:
            print(f"{threads.threads} {word}, {name}: {', '.join(_part(point, unit) for point in points)}")


def _print_grid(row_title: str, seconds: Mapping[tuple[int, int], float]) -> None:
    columns = sorted({sessions for _, sessions in seconds})
    table = Table(box=None, pad_edge=False)
    table.add_column(row_title, justify="right")
    for sessions in columns:
        table.add_column("1 session" if sessions == 1 else f"{sessions} sessions", justify="right")
    for length in sorted({length for length, _ in seconds}):
        table.add_row(str(length), *_cells(seconds, length, columns))
    print_table(table)


def _cells(seconds: Mapping[tuple[int, int], float], length: int, columns: Sequence[int]) -> list[str]:
    return [f"{seconds[length, sessions] * 1e3:.3f}" if (length, sessions) in seconds else "" for sessions in columns]


def _part(point: PartPoint, unit: str) -> str:
    unit = unit.removesuffix("s") if point.tokens == 1 else unit
    shown = f"{point.seconds * 1e3:.3f} ms" if point.seconds else "less than a step varies by"
    return f"{point.tokens} {unit} {shown}"
