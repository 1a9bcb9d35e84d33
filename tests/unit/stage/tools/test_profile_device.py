"""The measurements of `noodle profile` on a tiny model: which steps are timed, how often, and what is left out."""

import dataclasses
import importlib.util
import types

import pytest
import torch

from noodle.errors import ConfigurationError, GenerationFailed
from services.stage.executors.candidate import Candidate
from services.stage.executors.transformers import runtime
from services.stage.executors.transformers.loading import load_slice
from services.stage.selection import benchmark, device
from services.stage.selection.benchmark import SliceTimer
from services.stage.tools import profile_device
from services.stage.tools.profile import devices_of
from services.stage.tools.profile_device import (
    FULL,
    QUICK,
    DeviceProfiler,
    Point,
    fitting_kv_tokens,
    layer_points,
    repeated,
    thread_counts,
)
from tests.support.models.tiny_model import make_tiny_model

EXTENT = dataclasses.replace(QUICK, sessions=(1, 3), kv_tokens=(8, 64), chunk_tokens=(4, 16), maximum_rounds=3)
CONTEXT = 256
TRANSFORMERS = Candidate("transformers", "f32", "f32", "float32")
GGML = Candidate("ggml", "stored", "f16", "float32")
PARTS = ("layers", "embedding", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "CACHE_BYTES", 1 << 16)
    yield
    torch.set_num_threads(before)


def profiler(
    folder,
    notes,
    *,
    candidate=TRANSFORMERS,
    extent=EXTENT,
    layers=6,
    context=CONTEXT,
    budget_seconds=60.0,
    progress=lambda *_: None,
):
    return DeviceProfiler(
        folder=folder,
        device="cpu",
        candidate=candidate,
        reason="it computes this model",
        extent=extent,
        step_tokens=512,
        layer_count=layers,
        context_length=context,
        budget_seconds=budget_seconds,
        progress=progress,
        notes=notes,
    )


def test_layers_embedding_and_head_are_measured_with_each_number_of_threads(folder):
    notes, told = [], []
    device = profiler(folder, notes, progress=lambda done, _text: told.append(done)).measure((2, 1))
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
    assert device.dtype == "transformers f32"
    assert device.layer_bytes > 0
    assert device.kv_bytes_per_token > 0


@pytest.mark.skipif(importlib.util.find_spec("ggml") is None, reason="ggml is not installed (make ggml)")
def test_ggml_is_measured_in_the_types_of_the_file(folder):
    notes = []
    device = profiler(folder, notes, candidate=GGML).measure((2, 1))
    assert notes == []
    assert device.dtype == "ggml stored"
    assert [len(each.decode) for each in device.threads] == [4, 4]
    assert all(point.layer_seconds > 0 for each in device.threads for point in (*each.decode, *each.prefill))


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
    assert notes == ["cpu: left out decode over 1024 rows, which exceed the context or the memory."]


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


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Replaces torch's CUDA by a made-up card."""
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path)

    def replace(available=True, capability=(7, 0)):
        cuda = types.SimpleNamespace(
            is_available=lambda: available,
            get_device_capability=lambda: capability,
            get_arch_list=lambda: ["sm_70"],
            get_device_name=lambda: "a card",
        )
        monkeypatch.setattr(runtime, "torch", types.SimpleNamespace(cuda=cuda, __version__="2"))

    return replace


def test_card_and_processor_are_both_measured_if_both_are_there(card):
    card()
    assert devices_of("auto", []) == ["cuda", "cpu"]
    assert devices_of("cpu", []) == ["cpu"]
    card(available=False)
    assert devices_of("auto", []) == ["cpu"]


def test_a_card_without_kernels_is_left_out_with_a_note_unless_it_was_requested(card):
    card(capability=(6, 1))
    notes = []
    assert devices_of("auto", notes) == ["cpu"]
    assert "6.1" in notes[0]
    with pytest.raises(ConfigurationError):
        devices_of("cuda", [])


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (2, (2, 1)), (6, (6, 1, 2, 4)), (8, (8, 1, 2, 4)), (3, (3, 1, 2))]
)
def test_the_most_threads_come_first_then_one_and_its_doubles(most, expected):
    assert thread_counts(most) == expected


def test_every_batch_and_length_is_timed_with_every_number_of_threads():
    points = layer_points(FULL, (2, 1), FULL.kv_tokens, 8192, 4096)
    assert len(points) == len(set(points)) == 2 * (5 * 4 + 5 * 4)


def test_the_points_that_compare_threads_are_timed_first():
    points = layer_points(FULL, (2, 1), FULL.kv_tokens, 8192, 512)
    assert points[:4] == [
        Point(2, "decode", 1, 128),
        Point(2, "prefill", 1, 128),
        Point(1, "decode", 1, 128),
        Point(1, "prefill", 1, 128),
    ]
    assert {point.threads for point in points[4 : len(points) // 2]} == {2}


def test_no_chunk_passes_a_step_or_the_context():
    points = layer_points(FULL, (1,), FULL.kv_tokens, 256, 512)
    prefill = [point for point in points if point.kind == "prefill"]
    assert max(point.sessions * point.length for point in prefill) == 512
    assert max(point.length for point in prefill) == 256


def test_rows_stay_within_context_and_memory():
    assert fitting_kv_tokens(FULL, 8192, 1 << 30) == FULL.kv_tokens
    assert fitting_kv_tokens(FULL, 1024, 1 << 30) == (16, 128, 512)
    assert fitting_kv_tokens(FULL, 8192, 8 * 513) == (16, 128, 512)
    assert fitting_kv_tokens(FULL, 8192, 0) == ()


def test_without_room_for_any_row_prefill_is_timed_all_the_same():
    assert {point.kind for point in layer_points(QUICK, (1,), (), 8192, 512)} == {"prefill"}


def test_a_quick_profile_is_a_part_of_the_full_one():
    full = set(layer_points(FULL, (2, 1), FULL.kv_tokens, 8192, 512))
    assert set(layer_points(QUICK, (2, 1), QUICK.kv_tokens, 8192, 512)) < full


def test_a_fast_step_is_repeated_and_each_column_has_its_median():
    rounds = iter([(3.0e-6, 1.0e-6), (1.0e-6, 9.0e-6), (2.0e-6, 2.0e-6)])
    assert repeated(lambda: next(rounds), 3) == ((2.0e-6, 2.0e-6), 3)


def test_a_slow_step_is_done_once():
    assert repeated(lambda: (1.5, 1.5), 15) == ((1.5, 1.5), 1)


def test_rounds_end_with_the_points_time_but_not_below_the_minimum(monkeypatch):
    monkeypatch.setattr(profile_device, "POINT_SECONDS", 0.0)
    assert repeated(lambda: (0.1,), 15)[1] == profile_device.MINIMUM_ROUNDS
