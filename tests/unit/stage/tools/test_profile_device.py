"""`noodle profile`'s own measuring on a tiny model: what is there, what is left out and said."""

import dataclasses
import types

import pytest
import torch

from noodle.errors import ConfigurationError, GenerationFailed
from services.stage.executors.transformers.loading import load_slice
from services.stage.selection import slice_timing
from services.stage.selection.slice_timing import SliceTimer
from services.stage.tools.profile import devices_of
from services.stage.tools.profile_device import DeviceProfiler
from services.stage.tools.profile_points import QUICK
from tests.support.models.tiny_model import make_tiny_model

EXTENT = dataclasses.replace(QUICK, sessions=(1, 3), kv_tokens=(8, 64), chunk_tokens=(4, 16), maximum_rounds=3)
CONTEXT = 256
PARTS = ("layers", "embedding", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(slice_timing, "CACHE_BYTES", 1 << 16)
    yield
    torch.set_num_threads(before)


def profiler(folder, notes, *, extent=EXTENT, layers=6, context=CONTEXT, budget_seconds=60.0, say=lambda *_: None):
    return DeviceProfiler(
        folder=folder,
        device="cpu",
        dtype="auto",
        extent=extent,
        step_tokens=512,
        layer_count=layers,
        context_length=context,
        budget_seconds=budget_seconds,
        say=say,
        notes=notes,
    )


def test_layers_embedding_and_head_are_measured_with_each_number_of_threads(folder):
    notes, told = [], []
    device = profiler(folder, notes, say=lambda done, _text: told.append(done)).measure((2, 1))
    assert notes == []
    assert told == sorted(told)
    assert 0.0 <= told[0] <= told[-1] < 1.0
    assert [each.threads for each in device.threads] == [2, 1]
    for each in device.threads:
        assert [(point.kv_tokens, point.sessions) for point in each.decode] == [(8, 1), (8, 3), (64, 1), (64, 3)]
        assert [(point.chunk_tokens, point.sessions) for point in each.prefill] == [(4, 1), (4, 3), (16, 1), (16, 3)]
        assert all(point.layer_seconds > 0 for point in (*each.decode, *each.prefill))
        assert [point.tokens for point in each.embedding] == [1, 64]
        assert [point.tokens for point in each.head] == [1, 3]
        assert all(point.seconds >= 0 for point in (*each.embedding, *each.head))
    assert device.dtype == "float32"
    assert device.layer_bytes > 0
    assert device.kv_bytes_per_token > 0


def test_when_the_time_is_over_what_is_left_out_is_said(folder):
    notes = []
    device = profiler(folder, notes, budget_seconds=0.0).measure((1,))
    assert (device.threads[0].decode, device.threads[0].head) == ((), ())
    assert all(
        all(word in note for word in (name, "the time was over")) for name, note in zip(PARTS, notes, strict=True)
    )


def test_rows_beyond_the_context_are_left_out_and_said(folder):
    notes = []
    extent = dataclasses.replace(EXTENT, kv_tokens=(8, 1024))
    device = profiler(folder, notes, extent=extent).measure((1,))
    assert {point.kv_tokens for point in device.threads[0].decode} == {8}
    assert notes == ["cpu: left out decode over 1024 rows, which pass the context or the memory."]


def test_a_step_that_finds_no_memory_is_left_out_and_the_others_are_measured(folder, monkeypatch):
    real = SliceTimer.step_seconds

    def step_seconds(self, sessions, tokens, **options):
        if tokens == 16:
            raise GenerationFailed("no memory")
        return real(self, sessions, tokens, **options)

    monkeypatch.setattr(SliceTimer, "step_seconds", step_seconds)
    notes = []
    device = profiler(folder, notes).measure((1,))
    assert {point.chunk_tokens for point in device.threads[0].prefill} == {4}
    assert notes == ["cpu: left out 2 of 8 measurements of layers: the memory did not suffice."]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_very_few_layers_is_measured_too(layers, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=layers)
    device = profiler(folder, [], layers=layers).measure((1,))
    assert all(point.layer_seconds > 0 for point in device.threads[0].decode)


def test_rows_of_noise_are_attended_to_without_being_computed(folder):
    loaded = load_slice(folder, 2, 3, device="cpu", dtype="float32", context_length=CONTEXT)
    timer = SliceTimer(loaded, device="cpu", reserve_tokens=65)
    timer.fill_rows(2, 64)
    assert timer.step_seconds(2, 1, first_position=64) > 0
    assert timer.slice.kv_bytes_held() == timer.slice.kv_bytes_per_token * (2 * 65)


def fake_torch(available=True, capability=(7, 0), kernels=("sm_70",)):
    cuda = types.SimpleNamespace(
        is_available=lambda: available,
        get_device_capability=lambda: capability,
        get_arch_list=lambda: list(kernels),
        get_device_name=lambda: "a card",
    )
    return types.SimpleNamespace(cuda=cuda, __version__="2")


def test_card_and_processor_are_both_measured_where_both_are_there():
    assert devices_of("auto", fake_torch(), []) == ["cuda", "cpu"]
    assert devices_of("auto", fake_torch(available=False), []) == ["cpu"]
    assert devices_of("cpu", fake_torch(), []) == ["cpu"]


def test_a_card_without_kernels_is_left_out_and_said_unless_it_was_asked_for():
    notes = []
    assert devices_of("auto", fake_torch(capability=(6, 1)), notes) == ["cpu"]
    assert "6.1" in notes[0]
    with pytest.raises(ConfigurationError):
        devices_of("cuda", fake_torch(capability=(6, 1)), [])
