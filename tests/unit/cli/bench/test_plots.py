"""Plots of reports, and the message without matplotlib."""

import importlib.util
import struct

import pytest

from noodle.cluster.measuring import (
    ControlReady,
    DecodePoint,
    DeviceProfile,
    MachineProfile,
    PartPoint,
    PrefillPoint,
    ThreadsProfile,
)
from services.cli.bench import plots
from services.cli.bench.profile_report import ProfileConditions, ProfileReport, headline, remarks
from services.cli.bench.report import BenchConditions, BenchReport, Figures, Ratio, StageConditions, StreamsResult

HEAD = {"made_at": "2026-01-02T03:04:05+00:00", "machine": "laptop", "model": "SmolLM2-135M-Instruct", "headline": ""}


def figures(rate, wait=0.02):
    return Figures(1.5 / rate, wait, wait and 3 * wait, 100, 10 * rate, rate, (rate,))


def bench_report(control=True, waits=True):
    wait = 0.02 if waits else None
    results = tuple(
        StreamsResult(
            streams,
            figures(20.0 * streams**0.5, wait),
            figures(18.0 * streams**0.6, wait) if control else None,
            Ratio(1.0, 0.9, 1.1) if control else None,
        )
        for streams in (1, 2, 4, 8)
    )
    stage = StageConditions(0, "laptop", 15, "float32", "cpu", "a processor", 1)
    conditions = BenchConditions(
        "0.1.0", "0.1.0", "http://x", (stage, stage), 1, "", 256, "", "m", 128, 64, 5, 4, 2, 0.1,
        ControlReady("cpu", "a processor", "float32", 2, 2, 1, "2", "5") if control else None,
    )  # fmt: skip
    return BenchReport(**HEAD, conditions=conditions, results=results, remarks=())


def profile_report(device_count=1, empty=False):
    def threads(count):
        if empty:
            return ThreadsProfile(count)
        return ThreadsProfile(
            count,
            tuple(DecodePoint(s, k, 1e-3 * (s + k / 500) / count, 3) for k in (16, 128, 512) for s in (1, 2, 4, 8)),
            tuple(PrefillPoint(s, c, 1e-4 * s * (c + 20) / count, 3) for c in (16, 64, 128) for s in (1, 2, 4)),
            (PartPoint(1, 0.0, 3),),
            (PartPoint(1, 0.01, 3),),
        )

    device = DeviceProfile("cpu", "a processor", "float32", "", 1 << 33, "", 1 << 20, 1536, tuple(map(threads, (2, 1))))
    profile = MachineProfile(
        "d", "llama", 30, 576, 49152, 8192, "ggml-python 0.0.45", 2, 60.0, (device,) * device_count, ("x.",)
    )
    conditions = ProfileConditions("0.1.0", False, 512, 1.5, True)
    return ProfileReport(**HEAD, conditions=conditions, profile=profile, remarks=remarks(conditions, profile))


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("report", [bench_report(), bench_report(control=False), bench_report(waits=False)])
def test_a_bench_is_drawn_and_announced(report, tmp_path, capsys):
    path = tmp_path / "bench.png"
    assert plots.draw_bench(report, path) == f"Plot: {path}"
    assert capsys.readouterr().err == plots.DRAWING + "\n"
    assert min(png_size(path)) > 300


@pytest.mark.parametrize("report", [profile_report(), profile_report(2), profile_report(empty=True)])
def test_a_profile_is_drawn_with_a_row_for_each_device(report, tmp_path):
    path = tmp_path / "profile.png"
    assert plots.draw_profile(report, path) == f"Plot: {path}"
    width, height = png_size(path)
    assert height > 300 * len(report.profile.devices)
    assert width > 1000


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    path = tmp_path / "x.png"
    for said in (plots.draw_bench(bench_report(), path), plots.draw_profile(profile_report(), path)):
        assert "matplotlib" in said
        assert "plots" in said
        assert "\n" not in said
    assert not path.exists()


def test_a_profile_says_when_it_was_disturbed_and_what_was_left_out():
    report = profile_report()
    assert [remark.split()[0] for remark in report.remarks] == ["x.", "This", "`noodle"]
    quiet = ProfileConditions("0.1.0", False, 512, 0.1, False)
    assert remarks(quiet, report.profile) == ("x.",)


def test_the_headline_of_a_profile_is_a_layer_of_each_device():
    assert headline(profile_report().profile) == "cpu float32: a layer 0.63 ms a token, 0.058 in prefill"
    assert headline(profile_report(empty=True).profile) == ""
