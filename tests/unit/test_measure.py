"""Measurements of a tiny model: made once, kept, found by the second stage, made again when the file is damaged."""

import fcntl
import json
import threading

import pytest
import torch

from services.stage import measure, slice_timing
from services.stage.measure import FILE_NAME, LOCK_NAME, MeasuredSeconds, MeasurementKey, measure_machine
from tests.tiny_model import make_tiny_model

KEY = MeasurementKey("digest", "cpu", "a processor", "float32", 1, "0.1.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(measure, "MAXIMUM_ROUNDS", 3)
    monkeypatch.setattr(slice_timing, "CACHE_BYTES", 1 << 16)
    yield
    torch.set_num_threads(before)


def ignore(_fraction, _text):
    pass


def forbid(*_arguments, **_options):
    raise AssertionError("measured again")


def test_a_machine_is_measured_once_and_the_numbers_are_kept(folder, tmp_path, monkeypatch):
    told = []
    measured = measure_machine(folder, 6, 256, KEY, tmp_path, lambda fraction, text: told.append((fraction, text)))
    assert measured.source == "measured"
    assert 0 < measured.decode_layer_seconds < 1
    assert 0 < measured.prefill_layer_seconds_per_token < measured.decode_layer_seconds
    assert measured.head_decode_seconds >= 0
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
    assert told[-1] == (1.0, "measured")
    monkeypatch.setattr(measure, "_measure", forbid)
    assert measure_machine(folder, 6, 256, KEY, tmp_path, ignore) == measured


def test_another_dtype_or_version_is_measured_for_itself(folder, tmp_path):
    measure_machine(folder, 6, 256, KEY, tmp_path, ignore)
    other = MeasurementKey("digest", "cpu", "a processor", "bfloat16", 1, "0.1.0")
    measure_machine(folder, 6, 256, other, tmp_path, ignore)
    assert len(json.loads((tmp_path / FILE_NAME).read_text())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps({str(KEY): "fast"}),
        json.dumps({str(KEY): {"decode_layer_seconds": -1.0}}),
        json.dumps(
            {str(KEY): {"decode_layer_seconds": 0.0, "prefill_layer_seconds_per_token": 0.0, "head_decode_seconds": 0}}
        ),
    ],
)
def test_a_damaged_file_is_measured_again(damage, tmp_path, folder, monkeypatch):
    expected = MeasuredSeconds(0.5, 0.25, 0.125)
    monkeypatch.setattr(measure, "_measure", lambda *arguments: expected)
    (tmp_path / FILE_NAME).write_text(damage)
    assert measure_machine(folder, 6, 256, KEY, tmp_path, ignore) == expected
    monkeypatch.setattr(measure, "_measure", forbid)
    assert measure_machine(folder, 6, 256, KEY, tmp_path, ignore) == expected


def test_a_second_stage_waits_for_the_first_and_uses_its_numbers(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(measure, "_measure", forbid)
    waits = threading.Event()
    found = []

    def second_stage():
        found.append(measure_machine(folder, 6, 256, KEY, tmp_path, lambda _, text: "waiting" in text and waits.set()))

    with (tmp_path / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=second_stage)
        thread.start()
        assert waits.wait(10)
        numbers = {"decode_layer_seconds": 0.5, "prefill_layer_seconds_per_token": 0.25, "head_decode_seconds": 0.125}
        (tmp_path / FILE_NAME).write_text(json.dumps({str(KEY): numbers}))
    thread.join(10)
    assert found == [MeasuredSeconds(0.5, 0.25, 0.125)]


@pytest.mark.parametrize("layer_count", [1, 2, 3])
def test_a_model_of_very_few_layers_is_measured_too(layer_count, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=layer_count)
    measured = measure_machine(folder, layer_count, 256, KEY, tmp_path, ignore)
    assert measured.decode_layer_seconds > 0
