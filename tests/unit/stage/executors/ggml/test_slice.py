"""What is particular about a slice that ggml computes: its graphs, its weights' types and files, what it refuses."""

import gc
import itertools
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from noodle.errors import ConfigurationError, ModelNotFound, PlanDoesNotFit, UnsupportedModel, WireError
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import PackedBatch, Span
from services.stage.executors.ggml import slice
from services.stage.executors.kept_weights import HEADER_BYTES, MAGIC
from services.stage.executors.transformers.loading import load_slice
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import load_by_ggml, need_ggml
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

LENGTHS = (23, 9, 14)


@pytest.fixture(autouse=True)
def ggml_is_here():
    need_ggml()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), "llama", hidden_size=256, head_dim=64)
    # smaller weights than tiny models have: with as many as here a rounding of one would change everything after it
    tensors = load_file(folder / "model.safetensors")
    smaller = {key: value * np.float32(0.3) if value.ndim == 2 else value for key, value in tensors.items()}
    save_file(smaller, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder, start=0, end=6, **options):
    settings = {"weights": "f32", "kv_dtype": "f32", "context_length": 256, "threads": 1, **options}
    return load_by_ggml(folder, start, end, **settings)


def tokens_batch(session_id, first_position, token_ids, rows=(), reserve_tokens=64):
    span = Span(session_id, first_position, len(token_ids), reserve_tokens)
    return PackedBatch((span,), np.array(rows, np.int64), token_ids=np.array(token_ids, np.int64))


# of the largest logit, on random weights: about what each type rounds
BOUNDS = {"f32": 1e-5, "f16": 5e-3, "bf16": 3e-2, "q8_0": 4e-2, "q4_0": 0.6, "q4_K": 0.6}


@pytest.mark.parametrize("weights", BOUNDS)
def test_every_type_of_weights_is_as_near_as_it_can_be(weights, folder, tmp_path):
    sessions = random_sessions(LENGTHS)
    expected = unsplit_logits(folder, sessions)
    options = {"executor": "ggml", "weights": weights, "cache_dir": tmp_path}
    got = SlicePipeline(folder, (0, 2, 6), **options).run(sessions, STEPS)
    assert relative_difference(got, expected) < BOUNDS[weights]
    again = SlicePipeline(folder, (0, 2, 6), **options)
    assert [each.bytes_read for each in again.slices] == [0, 0]
    assert all(np.array_equal(one, other) for one, other in zip(again.run(sessions, STEPS), got, strict=True))


@pytest.mark.parametrize(("kv_dtype", "bound"), [("f32", 1e-5), ("f16", 2e-3), ("q8_0", 3e-2)])
def test_kv_rows_take_the_bytes_of_their_type(kv_dtype, bound, folder):
    sessions = random_sessions((90, 9, 70))
    steps = [[(0, 70)], [(0, 5), (1, 8)], [(1, 1), (0, 14), (2, 67)], [(2, 3), (0, 1)]]
    pipeline = SlicePipeline(folder, (0, 6), executor="ggml", kv_dtype=kv_dtype)
    assert relative_difference(pipeline.run(sessions, steps), unsplit_logits(folder, sessions)) < bound
    item_bytes = {"f32": 4, "f16": 2, "q8_0": 34 / 32}[kv_dtype]
    assert pipeline.slices[0].kv_bytes_per_token == 6 * 2 * 2 * 64 * item_bytes


@pytest.mark.parametrize(("kv_dtype", "bound"), [("f32", 1e-4), ("f16", 2e-3), ("q8_0", 3e-2)])
def test_latent_attention_keeps_one_vector_of_a_token_for_all_heads(kv_dtype, bound, tmp_path):
    folder = make_tiny_model(tmp_path, "minicpm3", weight_scale=0.05, kv_lora_rank=64)
    sessions = random_sessions((90, 9, 70))
    steps = [[(0, 70)], [(0, 5), (1, 8)], [(1, 1), (0, 14), (2, 67)], [(2, 3), (0, 1)]]
    pipeline = SlicePipeline(folder, (0, 2, 6), executor="ggml", kv_dtype=kv_dtype)
    assert relative_difference(pipeline.run(sessions, steps), unsplit_logits(folder, sessions)) < bound
    item_bytes = {"f32": 4, "f16": 2, "q8_0": 34 / 32}[kv_dtype]
    assert pipeline.slices[1].kv_bytes_per_token == 4 * (64 + 32) * item_bytes


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_long_chunks_and_windows_are_the_same_as_in_transformers(model_type, tmp_path):
    """Chunks of 64 tokens and more are attended to by another path of ggml's, rows over 512 by a third."""
    folder = make_tiny_model(tmp_path, model_type, sliding_window=100, max_position_embeddings=1024)
    sessions = random_sessions((640, 200))
    steps = [[(0, 150)], [(0, 70), (1, 130)], [(0, 1), (1, 69)], [(0, 400)], *[[(0, 1)]] * 18, [(0, 1), (1, 1)]]
    got = SlicePipeline(folder, (0, 3, 6), executor="ggml", context_length=1024).run(sessions, steps)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_chunks_below_a_tile_of_attention_are_the_same_wherever_they_stand_in_a_step(model_type, tmp_path):
    folder = make_tiny_model(tmp_path, model_type, sliding_window=40)
    sessions = random_sessions((120, 90, 60))
    steps = [[(0, 22)], [(1, 63), (0, 30)], [(0, 1), (2, 40), (1, 21)], [(2, 20), (1, 6), (0, 50)], [(0, 17)]]
    got = SlicePipeline(folder, (0, 3, 6), executor="ggml").run(sessions, steps)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < 1e-5


def test_graphs_are_bounded_in_number_and_in_bytes(folder, monkeypatch):
    monkeypatch.setattr(slice, "MAXIMUM_GRAPHS", 3)
    whole = load(folder)
    expected = whole.forward(tokens_batch("a", 0, list(range(10, 40)), rows=[29])).logits
    for count in range(1, 9):
        got = whole.forward(tokens_batch("b", 30 - count if count > 1 else 0, [9] * count)) if count == 1 else None
        assert got is None or got.logits.shape == (0, 199)
        whole.forward(tokens_batch(f"c{count}", 0, [5] * count, rows=[0]))
        assert len(whole._graphs) <= 3
    assert whole._graph_bytes == sum(graph.memory.byte_count for graph in whole._graphs.values())
    monkeypatch.setattr(slice, "MAXIMUM_GRAPH_BYTES", 1)
    assert np.array_equal(whole.forward(tokens_batch("d", 0, list(range(10, 40)), rows=[29])).logits, expected)
    assert len(whole._graphs) == 1


def test_token_ids_and_positions_that_a_model_has_not_are_refused_before_ggml_sees_them(tmp_path):
    whole = load(make_tiny_model(tmp_path, "gpt2"))
    for ids in ([5, 199], [-1, 5]):
        with pytest.raises(WireError, match="vocabulary of 199"):
            whole.forward(tokens_batch("a", 0, ids))
    whole.forward(tokens_batch("a", 0, [5] * 250, reserve_tokens=300))
    with pytest.raises(WireError, match="256"):
        whole.forward(tokens_batch("a", 250, [5] * 7, reserve_tokens=300))
    with pytest.raises(WireError):
        whole.forward(PackedBatch((Span("a", 0, 3, 8),), np.zeros(0, np.int64), token_ids=np.array([5, 6])))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "granite"])
def test_input_embeddings_on_the_first_stage_are_what_their_token_ids_are(model_type, tmp_path):
    folder = make_tiny_model(tmp_path, model_type, **({"embedding_multiplier": 3.0} if model_type == "granite" else {}))
    ids = [5, 17, 42, 99, 7]
    first = load(folder, 0, 3)
    by_ids = np.frombuffer(first.forward(tokens_batch("ids", 0, ids)).hidden_states.data, "<f4").copy()
    model = load_slice(folder, 0, 3, device="cpu", dtype="float32", context_length=256)._base
    embeddings = model.get_input_embeddings().weight.numpy()[ids]
    if model_type == "gemma2":
        embeddings = embeddings * 8.0  # its embedding module scales
    given = ActivationTensor("float32", embeddings.shape, np.ascontiguousarray(embeddings, np.float32).data.cast("B"))
    span = Span("embeddings", 0, len(ids), 32)
    by_embeddings = first.forward(PackedBatch((span,), np.zeros(0, np.int64), hidden_states=given)).hidden_states
    assert np.allclose(by_ids, np.frombuffer(by_embeddings.data, "<f4"), atol=1e-5)


def test_hidden_states_leave_in_the_graphs_memory_until_the_next_step_and_outlive_a_forgotten_slice(folder):
    first = load(folder, 0, 3)
    one = first.forward(tokens_batch("a", 0, [5, 17, 42])).hidden_states
    before = np.frombuffer(one.data, "<f4").copy()
    other = first.forward(tokens_batch("b", 0, [99, 7, 8])).hidden_states
    assert np.frombuffer(one.data, np.uint8).ctypes.data == np.frombuffer(other.data, np.uint8).ctypes.data
    again = first.forward(tokens_batch("a", 0, [5, 17, 42])).hidden_states
    forgotten = weakref.ref(first)
    del first, one, other
    gc.collect()
    assert np.array_equal(np.frombuffer(again.data, "<f4"), before)
    del again
    gc.collect()
    assert forgotten() is None


def test_logits_of_any_rows_of_the_last_step_can_be_asked_for(folder):
    whole = load(folder)
    every = whole.forward(tokens_batch("a", 0, list(range(10, 20)), rows=range(10))).logits
    whole.forward(tokens_batch("b", 0, list(range(10, 20))))
    assert np.allclose(whole.logits_of(np.array([9, 2])), every[[9, 2]], atol=1e-5)
    assert load(folder, 0, 3).logits_of(np.array([0])).shape == (0, 199)


def test_rows_of_noise_are_finite_and_count(folder):
    for kv_dtype in ("f32", "f16", "q8_0"):
        whole = load(folder, kv_dtype=kv_dtype)
        whole.forward(tokens_batch("a", 0, [5]))
        whole.fill_rows_with_noise("a", 60)
        assert np.isfinite(whole.forward(tokens_batch("a", 60, [6], rows=[0])).logits).all()
        assert whole.kv_bytes_held() == 61 * whole.kv_bytes_per_token


def test_a_damaged_or_cut_kept_file_is_made_again(folder, tmp_path, caplog):
    before = load(folder, weights="q8_0", cache_dir=tmp_path).forward(tokens_batch("a", 0, [5, 6], rows=[1])).logits
    kept = sorted(tmp_path.glob("ggml/*/*.weights"))
    assert [path.stem for path in kept] == ["0", "1", "2", "3", "4", "5", "embedding", "final_norm", "head"]
    with kept[0].open("r+b") as file:
        file.truncate(kept[0].stat().st_size - 1)
    content = bytearray(kept[1].read_bytes())
    content[-64:] = bytes(64)
    content[65536:65600] = bytes(64)
    kept[1].write_bytes(content)
    for path, header in ((kept[2], b"[]"), (kept[3], b"{"), (kept[4], b'{"layout": 1}')):
        path.write_bytes((MAGIC + header).ljust(HEADER_BYTES, b"\0") + path.read_bytes()[HEADER_BYTES:])
    whole = load(folder, weights="q8_0", cache_dir=tmp_path)
    assert whole.bytes_read > 0
    assert all(caplog.text.count(str(path)) == 1 for path in kept[1:5])
    assert np.array_equal(whole.forward(tokens_batch("a", 0, [5, 6], rows=[1])).logits, before)


def test_only_a_slices_own_tensors_are_read_and_fetched(folder):
    fetched = []
    middle = load(folder, 2, 4, fetch=fetched.extend)
    assert fetched
    assert {key.split(".")[2] for key in fetched} == {"2", "3"}
    sizes = {key: value.nbytes for key, value in load_file(folder / "model.safetensors").items()}
    assert middle.bytes_read == sum(sizes[key] for key in fetched)
    factors_bytes = 2 * 32 * 4
    assert middle.weight_bytes == middle.bytes_read + factors_bytes
    told = []
    load(folder, 5, 6, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0


def test_tied_embeddings_are_held_once_where_both_ends_are(tmp_path):
    folder = make_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    one, first, last = load(folder), load(folder, 0, 3), load(folder, 3, 6)
    assert one.weight_bytes == first.weight_bytes + last.weight_bytes - 199 * 64 * 4


def test_what_can_not_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(PlanDoesNotFit, match="has 6"):
        load(folder, 3, 7)
    with pytest.raises(ConfigurationError, match="q3"):
        load(folder, weights="q3")
    with pytest.raises(ConfigurationError, match="f64"):
        load(folder, kv_dtype="f64")
    odd = make_tiny_model(tmp_path / "odd", "llama")  # heads of 16
    with pytest.raises(UnsupportedModel, match="multiple of 32"):
        load(odd, kv_dtype="q8_0")
    tensors = load_file(odd / "model.safetensors")
    lacking = {key: value for key, value in tensors.items() if key != "model.layers.4.self_attn.k_proj.weight"}
    save_file(lacking, odd / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"model\.layers\.4\.self_attn\.k_proj"):
        load(odd)
    wrong = {**tensors, "model.layers.4.mlp.up_proj.weight": np.zeros((95, 64), np.float32)}
    save_file(wrong, odd / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"95.*needed"):
        load(odd)


def test_rows_that_fit_no_block_of_a_type_take_the_next_best(tmp_path):
    folder = make_tiny_model(tmp_path, "llama", hidden_size=40, intermediate_size=50, head_dim=10)
    sessions = random_sessions(LENGTHS)
    expected = unsplit_logits(folder, sessions)
    for weights, bound in (("q8_0", 5e-3), ("q4_0", 5e-3), ("q4_K", 5e-3)):  # all become f16 here
        got = SlicePipeline(folder, (0, 6), executor="ggml", weights=weights).run(sessions, STEPS)
        assert relative_difference(got, expected) < bound


def test_closed_slices_free_what_they_hold(folder):
    for _ in range(3):
        whole = load(folder)
        whole.forward(tokens_batch("a", 0, [5, 6]))
        whole.close()
        whole.close()
        assert not whole._graphs


def test_a_batch_of_many_sessions_is_the_same_in_any_order(folder):
    sessions = random_sessions((12,) * 7)
    whole = load(folder)
    for index, ids in enumerate(sessions):
        whole.forward(tokens_batch(str(index), 0, ids[: 5 + index]))
    results = []
    for order in itertools.islice(itertools.permutations(range(7)), 0, 5040, 1009):
        spans = tuple(Span(str(index), 5 + index, 1, 64) for index in order)
        ids = np.array([sessions[index][5 + index] if index < 7 else 0 for index in order])
        logits = whole.forward(PackedBatch(spans, np.arange(7), token_ids=ids)).logits
        results.append(logits[np.argsort(order)])
    assert all(np.allclose(each, results[0], atol=1e-5) for each in results)
