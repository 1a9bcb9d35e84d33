"""Every type of tensor that a GGUF file may hold: embeddings and products have the values of the gguf package.

Quantized blocks are made by ggml and read back by the gguf package, which is written independently of it.
"""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

from noodle.errors import UnsupportedModel
from noodle.model.ggml_types import GGML_TYPES
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import PackedBatch, Span
from tests.support.stages.executors import load_by_ggml, need_ggml
from tests.support.stages.ggml_operation import ggml_calls

HIDDEN, INNER, VOCABULARY, ROWS = 256, 512, 48, 5
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
NOT_COMPUTED = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
TYPES = [name for name in GGML_TYPES if name not in NOT_COMPUTED]
# relative to the largest result: activations are rounded to 8 bits, and for 16-bit weights to 16
BOUNDS = {"F32": 1e-5, "F16": 2e-3, "BF16": 8e-3}


@pytest.fixture(autouse=True)
def ggml_is_here():
    need_ggml()


def blocks_of(name, values):
    """The bytes of rows in a type, as ggml rounds them."""
    if name == "F32":
        return values
    kind, importance = GGML_TYPES[name], np.ones(values.shape[1], np.float32)
    blocks = np.zeros((len(values), kind.byte_count(values.shape[1])), np.uint8)
    pointers = (values.ctypes.data, blocks.ctypes.data)
    ggml_calls().ggml_quantize_chunk(kind.number, *pointers, 0, *values.shape, importance.ctypes.data)
    return blocks


def values_of(name, blocks):
    if name == "F32":
        return blocks
    if name == "Q1_0":  # the gguf package has no reader of it: a float16 scale, then a sign for each of 128 items
        each = blocks.reshape(-1, 18)
        signs = np.unpackbits(each[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
        return (each[:, :2].copy().view(np.float16).astype(np.float32) * signs).reshape(len(blocks), -1)
    return dequantize(blocks, GGMLQuantizationType[name])


def write_model(path, name):
    """A llama of two layers that add nothing to their input; returns the values of embeddings and head."""
    random = np.random.default_rng(7)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    ends = {}

    def add(tensor, values):
        blocks = blocks_of(name, values)
        raw = {"raw_dtype": GGMLQuantizationType[name]} if name != "F32" else {}
        writer.add_tensor(tensor, blocks, **raw)
        return values_of(name, blocks)

    for tensor in ("token_embd.weight", "output.weight"):
        ends[tensor] = add(tensor, random.standard_normal((VOCABULARY, HIDDEN), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for matrix, shape in MATRICES.items():
            is_last = matrix in ("attn_output", "ffn_down")
            values = np.zeros(shape, np.float32) if is_last else random.standard_normal(shape, np.float32)
            add(f"blk.{layer}.{matrix}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ends["token_embd.weight"], ends["output.weight"]


def load(path, start, end, weights="stored"):
    return load_by_ggml(path, start, end, weights=weights, kv_dtype="f32", context_length=64, threads=1)


@pytest.mark.parametrize("rows", [1, ROWS, 40])
@pytest.mark.parametrize("name", TYPES)
def test_embeddings_and_products_of_every_type_have_the_values_in_the_file(name, rows, tmp_path):
    path = tmp_path / "model.gguf"
    embeddings, head = write_model(path, name)
    spans = (Span("a", 0, rows, rows),)
    ids = np.arange(rows) % VOCABULARY
    hidden = load(path, 0, 1).forward(PackedBatch(spans, np.empty(0, np.int64), token_ids=ids)).hidden_states
    taken = np.frombuffer(hidden.data, np.float32).reshape(rows, HIDDEN)
    np.testing.assert_allclose(taken, embeddings[ids], rtol=2e-3 if name in ("F16", "BF16") else 1e-6, atol=1e-6)

    given = np.random.default_rng(3).standard_normal((rows, HIDDEN), np.float32)
    states = ActivationTensor("float32", given.shape, given.data.cast("B"))
    last = load(path, 1, 2)
    logits = last.forward(PackedBatch(spans, np.arange(rows), hidden_states=states)).logits
    expected = given / np.sqrt((given**2).mean(1, keepdims=True) + 1e-6) @ head.T
    assert np.abs(logits - expected).max() <= BOUNDS.get(name, 2e-2) * np.abs(expected).max()


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "TQ1_0", "MXFP4", "BF16"])
def test_exact_has_the_values_themselves(name, tmp_path):
    path = tmp_path / "model.gguf"
    _, head = write_model(path, name)
    given = np.random.default_rng(3).standard_normal((ROWS, HIDDEN), np.float32)
    states = ActivationTensor("float32", given.shape, given.data.cast("B"))
    batch = PackedBatch((Span("a", 0, ROWS, ROWS),), np.arange(ROWS), hidden_states=states)
    expected = given / np.sqrt((given**2).mean(1, keepdims=True) + 1e-6) @ head.T
    np.testing.assert_allclose(load(path, 1, 2, "f32").forward(batch).logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["Q8_K", "Q8_1"])
def test_types_that_only_activations_have_are_refused_by_name(name, tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    kind = GGML_TYPES[name]

    def add(tensor, shape):
        blocks = np.zeros((shape[0], kind.byte_count(shape[1])), np.uint8)
        writer.add_tensor(tensor, blocks, raw_dtype=GGMLQuantizationType[name])

    add("token_embd.weight", (VOCABULARY, HIDDEN))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(HIDDEN, np.float32))
    for matrix, shape in MATRICES.items():
        wide = (HIDDEN, HIDDEN) if matrix in ("attn_k", "attn_v") else shape
        add(f"blk.0.{matrix}.weight", wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=f"weight of .* is of type {name}"):
        load(path, 0, 1)
