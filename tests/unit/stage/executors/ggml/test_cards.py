"""A slice on a card, whose memory is not the machine's, computes what it computes on the CPU."""

import gc

import numpy as np
import pytest

from noodle.errors import ConfigurationError, GgmlUnavailable, StepRefused
from services.stage.executors import load
from services.stage.executors.base import PackedBatch, Span
from services.stage.executors.load import ggml_device, ggml_hindrance
from services.stage.selection.device import choose_device
from services.stage.selection.select import ExecutorOptions, choose_executor
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import load_by_ggml, need_ggml
from tests.support.stages.ggml_card import a_card
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

LENGTHS = (23, 9, 14)


@pytest.fixture(scope="module")
def card():
    with a_card() as name:
        yield name
        gc.collect()  # what is freed later would ask a process that is gone, and ggml ends this one then


def tokens(session_id, first, ids, reserve_tokens=64):
    rows = np.array([len(ids) - 1], np.int64)
    return PackedBatch((Span(session_id, first, len(ids), reserve_tokens),), rows, np.array(ids, np.int64))


@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "gpt2", "qwen3", "phi3", "mixtral"])
def test_a_family_on_a_card_is_what_transformers_computes(model_type, cuts, card, tmp_path):
    folder = make_tiny_model(tmp_path, model_type)
    sessions = random_sessions(LENGTHS)
    got = SlicePipeline(folder, cuts, executor="ggml", device_name=card).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < 1e-4


@pytest.mark.parametrize(("weights", "kv_dtype"), [("q8_0", "f16"), ("f16", "f16")])
def test_weights_in_fewer_bits_are_as_near_as_on_the_cpu(weights, kv_dtype, card, tmp_path):
    folder = make_tiny_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    sessions = random_sessions(LENGTHS)
    options = {"executor": "ggml", "weights": weights, "kv_dtype": kv_dtype}
    expected = unsplit_logits(folder, sessions)
    on_cpu = relative_difference(SlicePipeline(folder, (0, 6), **options).run(sessions, STEPS), expected)
    on_card = relative_difference(
        SlicePipeline(folder, (0, 6), device_name=card, **options).run(sessions, STEPS), expected
    )
    assert on_card <= 2 * on_cpu + 1e-4


def test_rows_are_copied_and_grow_on_the_card(card, tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    options = {"weights": "f32", "kv_dtype": "f32", "context_length": 256, "threads": 1}
    on_card = load_by_ggml(folder, 0, 6, device_name=card, **options)
    on_cpu = load_by_ggml(folder, 0, 6, **options)
    ids = list(range(5, 35))
    for each in (on_card, on_cpu):
        each.forward(tokens("a", 0, ids[:20], reserve_tokens=20))
        each.copy_rows("a", "b", 18, 30)
        each.reserve("a", 40, 30)
    for name, first in (("a", 20), ("b", 18)):
        got, expected = (
            each.forward(tokens(name, first, ids[first:30], reserve_tokens=40)).logits for each in (on_card, on_cpu)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_cards_memory_is_counted_by_what_is_reserved_and_refused_beyond_the_budget(card, tmp_path):
    slice_ = load_by_ggml(
        make_tiny_model(tmp_path, "llama"), 0, 6, device_name=card, weights="f32", context_length=256, threads=1
    )
    assert slice_.reserves_upfront
    slice_.set_kv_budget(100 * slice_.kv_bytes_per_token)
    slice_.forward(tokens("a", 0, [1, 2, 3], reserve_tokens=60))
    assert slice_.kv_bytes_held() == 60 * slice_.kv_bytes_per_token
    with pytest.raises(StepRefused) as refused:
        slice_.forward(tokens("b", 0, [1, 2, 3], reserve_tokens=60))
    assert refused.value.reason == "kv_budget"
    slice_.release("a")
    assert slice_.kv_bytes_held() == 0
    slice_.forward(tokens("b", 0, [1, 2, 3], reserve_tokens=60))
    slice_.fill_rows_with_noise("c", 30)
    assert np.isfinite(slice_.forward(tokens("c", 30, [5], reserve_tokens=31)).logits).all()
    slice_.close()


def test_a_device_that_this_ggml_lacks_is_named_with_the_cure(tmp_path):
    need_ggml()
    assert ggml_device("cpu") == "CPU"
    with pytest.raises(GgmlUnavailable, match=r"and not on vulkan\.") as lacks:
        ggml_device("vulkan")
    assert "-DGGML_VULKAN=ON" in str(lacks.value)
    assert "not on cuda" in ggml_hindrance({"model_type": "llama", "hidden_act": "silu"}, "cuda")


def test_on_a_cuda_card_ggml_computes_only_where_it_is_asked_for(monkeypatch):
    library = type("Library", (), {"devices": ("CPU", "CUDA0")})
    monkeypatch.setattr(load, "load_ggml", lambda: library)
    model = {"model_type": "llama", "hidden_act": "silu"}
    assert "NOODLE_EXECUTOR=ggml" in ggml_hindrance(model, "cuda", is_asked_for=False)
    assert not ggml_hindrance(model, "cuda", is_asked_for=True)
    assert not ggml_hindrance(model, "cpu", is_asked_for=False)
    asks = [
        ExecutorOptions(executor="ggml"),
        ExecutorOptions(weights="q8_0"),
        ExecutorOptions(),
        ExecutorOptions(weights="f16"),
        ExecutorOptions("transformers"),
    ]
    assert [options.asks_for_ggml for options in asks] == [True, True, False, False, False]


def test_a_card_that_ggml_has_is_found_by_its_kind(monkeypatch):
    need_ggml()
    library = type("Library", (), {"devices": ("CPU", "CUDA0", "CUDA1", "Vulkan0")})
    monkeypatch.setattr(load, "load_ggml", lambda: library)
    assert (ggml_device("cuda"), ggml_device("vulkan"), ggml_device("cpu")) == ("CUDA0", "Vulkan0", "CPU")


def test_where_torch_cannot_compute_ggml_does():
    assert choose_device("vulkan", ggml_only=False, has_torch=True).value == "vulkan"
    assert choose_executor(ExecutorOptions(), "", only_ggml="NOODLE_DEVICE=vulkan")[0] == "ggml"
    with pytest.raises(ConfigurationError, match="NOODLE_DEVICE=vulkan, but ggml is not installed"):
        choose_executor(ExecutorOptions(), "ggml is not installed here.", only_ggml="NOODLE_DEVICE=vulkan")
    with pytest.raises(ConfigurationError, match="ggml alone computes"):
        choose_executor(ExecutorOptions(executor="transformers"), "", only_ggml="NOODLE_DEVICE=vulkan")
