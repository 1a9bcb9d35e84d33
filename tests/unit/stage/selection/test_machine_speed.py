"""The speed of this machine: measured once for each type, kept, and measured again when the file is damaged."""

import json
import subprocess
import sys

import msgspec
import pytest

from services.stage.selection import machine_speed as module
from services.stage.selection.benchmark import FILE_NAME
from services.stage.selection.layer_costs import MachineSpeed
from services.stage.selection.machine_speed import SpeedMeter, machine_speed
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import need_ggml


@pytest.fixture(autouse=True)
def small(monkeypatch):
    need_ggml()
    monkeypatch.setattr(module, "OUTPUTS", 64)
    monkeypatch.setattr(module, "READ_BYTES", 1 << 20)


@pytest.fixture
def measured(monkeypatch):
    """The types whose products were measured, in order."""
    found = []
    real = SpeedMeter.product_seconds

    def product_seconds(self, name):
        found.append(name)
        return real(self, name)

    monkeypatch.setattr(SpeedMeter, "product_seconds", product_seconds)
    return found


def speed(folder, *types, threads=1, told=lambda *_: None):
    return machine_speed(types, key="here", device_name="CPU", threads=threads, cache_dir=folder, progress=told)


def test_a_machine_is_measured_once_and_later_only_for_further_types(tmp_path, measured):
    first = speed(tmp_path, "Q8_0", "F32")
    assert first.is_plausible
    assert set(first.product_seconds) == {"Q8_0", "F32"}
    assert all(len(each) == 3 and max(each) < 1 for each in first.product_seconds.values())
    assert speed(tmp_path, "F32") == first
    further = speed(tmp_path, "F32", "Q4_K")
    assert measured == ["Q8_0", "F32", "Q4_K"]
    assert msgspec.structs.replace(further, product_seconds=first.product_seconds) == first


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q5_0", "Q6_K", "IQ4_XS", "MXFP4"])
def test_every_kind_of_type_can_be_measured(name, tmp_path):
    assert speed(tmp_path, name).is_plausible


def test_a_type_that_cannot_be_multiplied_is_left_out(tmp_path, measured):
    assert set(speed(tmp_path, "I32", "Q8_0").product_seconds) == {"Q8_0"}
    assert measured == ["Q8_0"]


@pytest.mark.parametrize("damage", ["", "{", "[]", json.dumps({"here": {"threads": 1}}), json.dumps({"here": 3})])
def test_a_damaged_file_is_measured_again(damage, tmp_path, measured):
    (tmp_path / FILE_NAME).write_text(damage)
    assert speed(tmp_path, "Q8_0").is_plausible
    assert measured == ["Q8_0"]
    speed(tmp_path, "Q8_0")
    assert measured == ["Q8_0"]


def test_numbers_that_cannot_be_are_measured_again(tmp_path, measured):
    absurd = msgspec.structs.replace(speed(tmp_path, "Q8_0"), product_seconds={"Q8_0": (0.0, 0.0, 0.0)})
    (tmp_path / FILE_NAME).write_bytes(msgspec.json.encode({"here": absurd}))
    assert speed(tmp_path, "Q8_0").is_plausible
    assert measured == ["Q8_0", "Q8_0"]


@pytest.mark.parametrize(("half_takes", "taken"), [(0.9, 4), (0.97, 8), (1.5, 8)])
def test_half_the_threads_are_taken_where_they_are_clearly_faster(half_takes, taken, tmp_path, monkeypatch):
    threads = [8]
    monkeypatch.setattr(SpeedMeter, "set_threads", lambda _self, count: threads.append(count))
    seconds = {8: (1e-9, 1e-9, 1e-9), 4: tuple(half_takes * each for each in (1e-9, 1e-9, 1e-9))}
    monkeypatch.setattr(SpeedMeter, "product_seconds", lambda _self, _name: seconds[threads[-1]])
    found = speed(tmp_path, "Q8_0", threads=8)
    assert (found.threads, threads[-1]) == (taken, taken)
    assert found.product_seconds["Q8_0"] == seconds[taken]
    assert speed(tmp_path, "Q8_0", threads=8) == found


def test_a_report_is_made_without_torch(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    script = f"""
import sys
from pathlib import Path
from noodle.config.environment import stage_config
from services.stage.selection import machine_speed
from services.stage.selection.report import build_machine_report
machine_speed.OUTPUTS, machine_speed.READ_BYTES = 64, 1 << 20
config = stage_config({{
    "NOODLE_CLUSTER_TOKEN": "a-long-enough-secret", "NOODLE_CACHE_DIR": {str(tmp_path / "cache")!r},
    "NOODLE_COORDINATOR_URL": "http://127.0.0.1:9", "NOODLE_THREADS": "1",
}})
report = build_machine_report(config, "boot", Path({str(folder)!r}), progress=lambda *_: None)
assert (report.executor, report.weights, report.kv_dtype) == ("ggml", "stored", "f16"), report
assert report.decode_layer_seconds > 0 and report.layer_weight_bytes > 0, report
assert not {{"torch", "transformers"}} & set(sys.modules), "imported"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_kept_speed_is_of_its_own_machine(tmp_path, measured):
    speed(tmp_path, "Q8_0")
    other = machine_speed(
        ["Q8_0"], key="there", device_name="CPU", threads=1, cache_dir=tmp_path, progress=lambda *_: None
    )
    assert isinstance(other, MachineSpeed)
    assert measured == ["Q8_0", "Q8_0"]
