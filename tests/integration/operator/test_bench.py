"""`noodle bench` and `noodle profile` end to end on a real cluster of a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes.cluster import Cluster

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux"),
    pytest.mark.timeout(300),
]
SMALL = ("--streams", "1,3", "--prompt-tokens", "24", "--new-tokens", "8", "--pairs", "2")


def kept(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    done = cluster.noodle(kind, "--list", "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_bench_measures_both_sides_prints_draws_and_keeps(cluster: Cluster, tmp_path: Path) -> None:
    before = len(kept(cluster, "bench"))
    done = cluster.noodle("bench", *SMALL, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "cluster" in done.stdout
    assert "control" in done.stdout
    assert "one batch through generate()" in done.stdout
    report = json.loads(next(tmp_path.glob("noodle-bench-*.json")).read_text())
    assert next(tmp_path.glob("noodle-bench-*.png")).read_bytes().startswith(b"\x89PNG")
    conditions = report["conditions"]
    assert conditions["control"]["threads"] == sum(stage["threads"] for stage in conditions["stages"]) == 2
    assert (conditions["control"]["dtype"], conditions["control"]["device"]) == ("float32", "cpu")
    assert len(conditions["model_digest"]) == 64
    for result, streams in zip(report["results"], (1, 3), strict=True):
        assert result["streams"] == streams
        for side in ("cluster", "control"):
            figures = result[side]
            assert len(figures["runs_tokens_per_second"]) == 2
            assert figures["between_tokens_samples"] == 2 * streams * 7
            assert 0 < figures["between_tokens_seconds"] <= figures["between_tokens_p99_seconds"]
            assert min(figures["first_token_seconds"], figures["prefill_tokens_per_second"]) > 0
        assert result["ratio"]["least"] <= result["ratio"]["median"] <= result["ratio"]["most"]
    listed = kept(cluster, "bench")
    assert len(listed) == before + 1
    assert listed[0]["headline"] == report["headline"]
    shown = cluster.noodle("bench", "--show", listed[0]["id"])
    assert shown.stdout == done.stdout
    assert json.loads(cluster.noodle("bench", "--show", listed[0]["id"], "--json").stdout) == report
    assert listed[0]["id"] in cluster.noodle("bench", "--list").stdout


def test_bench_without_a_control_needs_no_model_here(cluster: Cluster, tmp_path: Path) -> None:
    arguments = (
        "--streams",
        "2",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "1",
        "--pairs",
        "1",
        "--no-control",
        "--json",
    )
    done = cluster.noodle("bench", *arguments, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "control" not in report["results"][0] or report["results"][0]["control"] is None
    assert report["results"][0]["cluster"]["between_tokens_seconds"] is None
    assert any("no control" in remark for remark in report["remarks"])


def test_what_passes_the_context_is_refused_before_anything_runs(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.noodle("bench", "--new-tokens", "100000", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "--new-tokens" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_report_that_is_not_there_is_said_so(cluster: Cluster) -> None:
    done = cluster.noodle("bench", "--show", "20260101-000000-000000-bench-ffffff")
    assert done.returncode == 1
    assert "no report" in done.stderr


def test_options_of_measuring_are_refused_beside_list(cluster: Cluster) -> None:
    done = cluster.noodle("bench", "--list", "--pairs", "3")
    assert done.returncode == 1
    assert "--pairs" in done.stderr


def test_profile_measures_layers_embedding_and_head_and_keeps_it(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.noodle("profile", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "decode: milliseconds a layer" in done.stdout
    assert "free memory" in done.stdout
    report = json.loads(next(tmp_path.glob("noodle-profile-*.json")).read_text())
    assert next(tmp_path.glob("noodle-profile-*.png")).read_bytes().startswith(b"\x89PNG")
    assert report["profile"]["layer_count"] == 6
    device = report["profile"]["devices"][0]
    assert (device["device"], device["dtype"]) == ("cpu", "ggml stored")
    assert device["free_bytes"] > 1e6
    threads = device["threads"][0]
    assert {(point["sessions"], point["kv_tokens"]) for point in threads["decode"]} == {(1, 128), (4, 128)}
    assert {(point["sessions"], point["chunk_tokens"]) for point in threads["prefill"]} == {
        (sessions, tokens) for sessions in (1, 4) for tokens in (16, 128)
    }
    assert all(point["layer_seconds"] > 0 for point in threads["decode"] + threads["prefill"])
    assert [point["tokens"] for point in threads["head"]] == [1, 4]
    assert any("left out" in remark for remark in report["remarks"])  # rows beyond the tiny model's context
    listed = kept(cluster, "profile")
    assert listed[0]["headline"] == report["headline"]
    assert cluster.noodle("profile", "--show", listed[0]["id"]).stdout == done.stdout
