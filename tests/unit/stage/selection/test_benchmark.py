"""Measurements of a tiny model: made once, kept, found by the second stage, made again when the file is damaged."""

import dataclasses
import fcntl
import json
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from noodle.errors import NotWritable
from services.stage.executors.candidate import Candidate
from services.stage.selection import benchmark
from services.stage.selection.benchmark import FILE_NAME, MeasurementKey, measure_machine
from services.stage.selection.layer_costs import LayerSeconds
from tests.support.models.tiny_model import make_tiny_model

KEY = MeasurementKey(
    model_digest="digest",
    device="cpu",
    device_name="a processor",
    candidate=Candidate("transformers", "f32", "f32", "float32"),
    executor_version="torch",
    threads=1,
    noodle_version="0.1.0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(benchmark, "MAXIMUM_ROUNDS", 3)
    monkeypatch.setattr(benchmark, "CACHE_BYTES", 1 << 16)
    yield
    torch.set_num_threads(before)


def ignore(_fraction, _text):
    pass


def forbid(*_arguments, **_options):
    raise AssertionError("measured again")


def test_a_machine_is_measured_once_and_the_numbers_are_kept(folder, tmp_path, monkeypatch):
    told = []
    measured = measure_machine(
        folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=lambda fraction, text: told.append((fraction, text))
    )
    assert measured.source == "measured"
    assert 0 < measured.decode_layer_seconds < 1
    assert 0 < measured.prefill_layer_seconds_per_token < measured.decode_layer_seconds
    assert measured.head_decode_seconds >= 0
    assert 0 < measured.batched_layer_seconds < 1
    assert measured.batched_head_seconds >= 0
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
    assert told[-1] == (1.0, "measured")
    monkeypatch.setattr(benchmark, "_measure", forbid)
    assert measure_machine(folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=ignore) == measured


def test_another_dtype_or_version_is_measured_for_itself(folder, tmp_path):
    measure_machine(folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=ignore)
    other = dataclasses.replace(KEY, candidate=Candidate("transformers", "bf16", "bf16", "bfloat16"))
    measure_machine(folder, 6, 256, key=other, cache_dir=tmp_path, progress=ignore)
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
        json.dumps({str(KEY): dataclasses.asdict(LayerSeconds(0.5, 0.25, 0.125, 0.0, 0.0))}),
        json.dumps({str(KEY): dataclasses.asdict(LayerSeconds(0.5, 0.25, 0.125, 0.3, -0.1))}),
    ],
)
def test_a_damaged_file_is_measured_again(damage, tmp_path, folder, monkeypatch):
    expected = LayerSeconds(0.5, 0.25, 0.125, 0.3, 0.05)
    monkeypatch.setattr(benchmark, "_measure", lambda *arguments: expected)
    (tmp_path / FILE_NAME).write_text(damage)
    assert measure_machine(folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=ignore) == expected
    monkeypatch.setattr(benchmark, "_measure", forbid)
    assert measure_machine(folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=ignore) == expected


def test_a_second_stage_waits_for_the_first_and_uses_its_numbers(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(benchmark, "_measure", forbid)
    waits = threading.Event()
    found = []

    def second_stage():
        found.append(
            measure_machine(
                folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=lambda _, text: "waiting" in text and waits.set()
            )
        )

    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=second_stage)
    thread.start()
    assert waits.wait(10)
    numbers = dataclasses.asdict(LayerSeconds(0.5, 0.25, 0.125, 0.3, 0.05))
    (tmp_path / FILE_NAME).write_text(json.dumps({str(KEY): numbers}))
    os.close(lock)
    thread.join(10)
    assert found == [LayerSeconds(0.5, 0.25, 0.125, 0.3, 0.05)]


@pytest.mark.parametrize("layer_count", [1, 2, 3])
def test_a_model_of_very_few_layers_is_measured_too(layer_count, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=layer_count)
    measured = measure_machine(folder, layer_count, 256, key=KEY, cache_dir=tmp_path, progress=ignore)
    assert measured.decode_layer_seconds > 0


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_folder_that_can_not_be_made_is_refused_with_path_reason_and_cure(below, tmp_path, folder):
    (tmp_path / "file").write_text("not a folder")
    cache_dir = tmp_path / "file" / below
    with pytest.raises(NotWritable) as caught:
        measure_machine(folder, 6, 256, key=KEY, cache_dir=cache_dir, progress=ignore)
    assert f"{cache_dir} cannot be written" in caught.value.message
    assert "NOODLE_CACHE_DIR" in caught.value.cure


def test_a_measurement_that_can_not_be_kept_is_used_and_said(tmp_path, folder, monkeypatch, caplog):
    expected = LayerSeconds(0.5, 0.25, 0.125, 0.3, 0.05)
    monkeypatch.setattr(benchmark, "_measure", lambda *arguments: expected)

    def full_disk(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with caplog.at_level(logging.WARNING):
        assert measure_machine(folder, 6, 256, key=KEY, cache_dir=tmp_path, progress=ignore) == expected
    assert f"{tmp_path / FILE_NAME} cannot be written (No space left on device)" in caplog.text
    assert "made again at each start" in caplog.text
    assert list(tmp_path.iterdir()) == []
