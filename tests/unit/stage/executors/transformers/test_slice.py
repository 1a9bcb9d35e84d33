"""A slice as the worker sees it: packed batches, replays, windows, budgets, dtypes and what it refuses."""

from functools import partial

import numpy as np
import pytest
import torch

from noodle.errors import GenerationFailed, PositionGap, StepRefused, WireError
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from services.stage.executors.transformers import attention
from services.stage.executors.transformers.slice import from_wire, to_wire
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import EXECUTORS, load_exact
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

LENGTHS = (23, 9, 14)
NO_ROWS = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=EXECUTORS)
def executor(request):
    return request.param


@pytest.fixture
def load_any(executor):
    """`load` for whichever executor."""
    return partial(load_exact, executor)


def load(folder, start, end, **options):
    return load_exact("transformers", folder, start, end, **options)


def tokens_batch(session_id, first_position, token_ids, rows=(), reserve_tokens=32):
    span = Span(session_id, first_position, len(token_ids), reserve_tokens)
    return PackedBatch((span,), np.array(rows, np.int64), token_ids=np.array(token_ids, np.int64))


def test_a_slice_says_what_it_is(load_any, folder):
    first: ModelSlice = load_any(folder, 0, 2)
    last: ModelSlice = load_any(folder, 2, 6)
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    assert (first.hidden_size, first.vocab_size, first.dtype) == (64, 199, "float32")
    assert first.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head size, bytes
    assert first.kv_bytes_held() == 0


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gpt_oss", "qwen3", "cohere2"])
def test_sessions_longer_than_the_sliding_window_are_the_same_in_slices(model_type, tmp_path):
    options = {"use_sliding_window": True, "max_window_layers": 3} if model_type == "qwen3" else {}
    folder = make_tiny_model(tmp_path, model_type, sliding_window=5, **options)
    sessions = random_sessions((40, 9, 30))
    steps = [[(0, 4)], [(0, 1), (1, 8)], [(0, 6), (2, 20)], [(1, 1), (0, 28), (2, 1)], [(2, 9), (0, 1)]]
    pipeline = SlicePipeline(folder, (0, 1, 4, 6))
    assert relative_difference(pipeline.run(sessions, steps), unsplit_logits(folder, sessions)) < 1e-4


def test_rows_computed_again_change_nothing(executor, folder):
    sessions = random_sessions(LENGTHS)
    expected = SlicePipeline(folder, (0, 3, 6), executor=executor).run(sessions, STEPS)
    pipeline = SlicePipeline(folder, (0, 3, 6), executor=executor)
    pipeline.run(sessions, STEPS)
    held = [each.kv_bytes_held() for each in pipeline.slices]
    again = pipeline.run(sessions, [[(2, 14), (0, 20)], [(1, 9)], [(0, 3)]])
    assert relative_difference(again, expected) < 1e-5
    assert [each.kv_bytes_held() for each in pipeline.slices] == held


def test_slices_in_one_process_do_not_meet(executor, folder, tmp_path):
    other_folder = make_tiny_model(tmp_path, "llama", seed=9)
    sessions = random_sessions(LENGTHS)
    attention.register()
    one, other = (
        SlicePipeline(folder, (0, 3, 6), executor=executor),
        SlicePipeline(other_folder, (0, 3, 6), executor=executor),
    )
    results = ([], [])
    for step in range(23):
        for pipeline, result in zip((one, other), results, strict=True):
            result.append(pipeline.step([Span("same name", step, 1, 23)], sessions[0][step : step + 1], [0]))
    for pipeline_folder, result in zip((folder, other_folder), results, strict=True):
        assert relative_difference([np.concatenate(result)], unsplit_logits(pipeline_folder, sessions[:1])) < 1e-4


def test_the_head_is_computed_for_the_rows_that_are_asked_for_and_no_others(folder, monkeypatch):
    whole = load(folder, 0, 6)
    seen = []
    head = whole._head.lm_head
    monkeypatch.setattr(type(head), "forward", _spy(type(head).forward, head, seen))
    ids = list(range(10, 20))
    every = whole.forward(tokens_batch("a", 0, ids, rows=range(10))).logits
    some = whole.forward(tokens_batch("b", 0, ids, rows=(9, 2))).logits
    none = whole.forward(tokens_batch("c", 0, ids)).logits
    assert [shape[-2] for shape in seen] == [10, 2]
    assert np.allclose(some, every[[9, 2]], atol=1e-5)
    assert none.shape == (0, 199)
    assert every.dtype == np.float32


def _spy(forward, module, seen):
    def spying(self, hidden_states):
        if self is module:
            seen.append(hidden_states.shape)
        return forward(self, hidden_states)

    return spying


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hidden_states_of_another_dtype_are_taken(folder, dtype):
    first, last = load(folder, 0, 3, dtype=dtype), load(folder, 3, 6)
    batch = tokens_batch("a", 0, list(range(10, 22)))
    handed_on = first.forward(batch).hidden_states
    assert handed_on.dtype == dtype
    assert handed_on.data.nbytes == 12 * 64 * 2
    logits = last.forward(PackedBatch(batch.spans, np.array([11]), hidden_states=handed_on)).logits
    whole = load(folder, 0, 6).forward(tokens_batch("a", 0, list(range(10, 22)), rows=[11])).logits
    assert relative_difference([logits], [whole]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_comes_back_from_the_wire_as_it_was(dtype):
    tensor = torch.randn(3, 5).to(dtype)
    sent = to_wire(tensor)
    assert torch.equal(from_wire(sent), tensor)
    received = ActivationTensor(sent.dtype, sent.shape, memoryview(bytes(sent.data)))
    assert torch.equal(from_wire(received), tensor)


def test_released_sessions_hold_nothing_and_start_again(load_any, folder):
    whole = load_any(folder, 0, 6)
    first = whole.forward(tokens_batch("a", 0, [5, 6, 7], rows=[2])).logits
    assert whole.kv_bytes_held() == 3 * whole.kv_bytes_per_token
    whole.release("a")
    whole.release("a")
    assert whole.kv_bytes_held() == 0
    with pytest.raises(PositionGap):
        whole.forward(tokens_batch("a", 3, [8]))
    assert whole.kv_bytes_held() == 0
    again = whole.forward(tokens_batch("a", 0, [5, 6, 7], rows=[2])).logits
    assert np.array_equal(first, again)


def test_a_batch_that_passes_the_kv_budget_is_refused_and_reserves_nothing(load_any, folder):
    whole = load_any(folder, 0, 6)
    whole.set_kv_budget(40 * whole.kv_bytes_per_token)
    batch = PackedBatch((Span("a", 0, 32, 32), Span("b", 0, 9, 32)), NO_ROWS, token_ids=np.arange(41))
    with pytest.raises(StepRefused) as refusal:
        whole.forward(batch)
    assert refusal.value.reason == "kv_budget"
    assert "session b" in str(refusal.value)
    whole.forward(tokens_batch("c", 0, list(range(40)), reserve_tokens=40))


def test_copied_rows_compute_what_computed_ones_do(load_any, folder):
    ids = list(range(20, 44))
    whole = load_any(folder, 0, 6)
    expected = whole.forward(tokens_batch("a", 0, ids, rows=[23])).logits
    whole.forward(tokens_batch("b", 0, ids[:16]))
    whole.copy_rows("b", "c", 16, 32)
    whole.release("b")
    got = whole.forward(tokens_batch("c", 16, ids[16:], rows=[7])).logits
    assert np.allclose(got, expected, atol=1e-5)
    with pytest.raises(PositionGap):
        whole.copy_rows("b", "d", 16, 32)


def test_hidden_states_that_do_not_fit_the_spans_are_refused(load_any, folder):
    last = load_any(folder, 3, 6)
    span = Span("a", 0, 4, 8)
    for shape in ((3, 64), (4, 32)):
        with pytest.raises(WireError) as refusal:
            last.forward(PackedBatch((span,), NO_ROWS, hidden_states=to_wire(torch.zeros(shape))))
        assert str(shape[0]) in str(refusal.value)
    with pytest.raises(WireError):
        last.forward(PackedBatch((span,), NO_ROWS, token_ids=np.arange(4)))
    assert last.kv_bytes_held() == 0


def test_a_device_without_memory_fails_the_generation_and_names_the_cure(folder, monkeypatch):
    whole = load(folder, 0, 6)

    def out_of_memory(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(whole, "_compute", out_of_memory)
        with pytest.raises(GenerationFailed) as failure:
            whole.forward(tokens_batch("a", 0, [5, 6]))
        assert "NOODLE_KV_BYTES" in failure.value.cure
    with pytest.raises(PositionGap):  # rows of a step that failed do not count
        whole.forward(tokens_batch("a", 2, [7]))
    assert whole.forward(tokens_batch("a", 0, [5, 6], rows=[1])).logits.shape == (1, 199)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_input_embeddings_on_the_first_stage_are_what_their_token_ids_are(model_type, tmp_path):
    first = load(make_tiny_model(tmp_path, model_type), 0, 3)
    ids = [5, 17, 42, 99, 7]
    by_ids = first.forward(tokens_batch("ids", 0, ids)).hidden_states
    embeddings = embeddings_of(first._base, ids)
    span = Span("embeddings", 0, len(ids), 32)
    by_embeddings = first.forward(PackedBatch((span,), NO_ROWS, hidden_states=to_wire(embeddings))).hidden_states
    assert torch.allclose(from_wire(by_ids), from_wire(by_embeddings), atol=1e-6)


def embeddings_of(model, ids):
    """As transformers' own callers would make them for `inputs_embeds`."""
    with torch.inference_mode():
        return model.get_input_embeddings()(torch.tensor(ids))


def test_a_session_that_reserves_more_keeps_its_rows_and_its_budget_is_counted(load_any, folder):
    straight, growing = load_any(folder, 0, 6), load_any(folder, 0, 6)
    ids = list(range(20, 44))
    expected = straight.forward(tokens_batch("a", 0, ids, rows=[23], reserve_tokens=64)).logits
    growing.set_kv_budget(40 * growing.kv_bytes_per_token)
    growing.forward(tokens_batch("a", 0, ids[:8], reserve_tokens=8))
    growing.forward(tokens_batch("a", 8, ids[8:16], reserve_tokens=16))
    got = growing.forward(tokens_batch("a", 16, ids[16:], rows=[7], reserve_tokens=32)).logits
    assert np.allclose(got, expected, atol=1e-5)
    assert growing.kv_bytes_held() == 24 * growing.kv_bytes_per_token
    with pytest.raises(StepRefused):
        growing.forward(tokens_batch("a", 24, list(range(17)), reserve_tokens=64))
    growing.forward(tokens_batch("a", 24, list(range(16)), reserve_tokens=64))
    growing.release("a")
    growing.forward(tokens_batch("b", 0, list(range(40)), reserve_tokens=64))
