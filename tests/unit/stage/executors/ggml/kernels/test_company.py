"""A token's results do not depend on the tokens that are computed beside it (design D16)."""

import itertools

import numpy as np
import pytest

from services.stage.executors.base import PackedBatch, Span
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.executors import load_by_ggml
from tests.support.stages.ggml_operation import Graph, ggml_calls

TOKENS = 70
NEOX, INTERLEAVED = 2, 0


@pytest.fixture(scope="module")
def ggml():
    return ggml_calls()


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotary(pairing, graph, rows, positions):
    ggml, context = graph.ggml, graph.memory.context
    factors = graph.input(np.geomspace(1.0, 1e4, 32, dtype=np.float32))
    return ggml.ggml_rope_ext(context, rows, positions, factors, 64, pairing, 0, 1.0, 1.0, 0.0, 1.0, 32.0, 1.0)


def norm(name, graph, rows, _positions):
    return getattr(graph.ggml, f"ggml_{name}")(graph.memory.context, rows, 1e-5)


OPERATIONS = {
    "rotary of halves": lambda *given: rotary(NEOX, *given),
    "rotary of pairs": lambda *given: rotary(INTERLEAVED, *given),
    "rms_norm": lambda *given: norm("rms_norm", *given),
    "norm": lambda *given: norm("norm", *given),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_ggmls_operations_over_heads_give_a_token_the_same_bits_alone(operation, threads, ggml):
    rows, positions = random(TOKENS, 7, 64), np.arange(TOKENS, dtype=np.int32) * 31

    def computed(begin, end, threads):
        graph = Graph(ggml, threads)
        given = graph.input(rows[begin:end]), graph.input(positions[begin:end])
        return graph.compute(OPERATIONS[operation](graph, *given), (end - begin, 7, 64))

    together = computed(0, TOKENS, threads)
    for token in (0, 1, 33, TOKENS - 1):
        np.testing.assert_array_equal(computed(token, token + 1, 1), together[token : token + 1])


FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_models_logits_are_the_same_however_the_prompt_is_cut(family, kv_dtype, tmp_path, ggml):
    folder = make_tiny_model(tmp_path, family, hidden_size=128, head_dim=32)
    ids = np.random.default_rng(1).integers(0, 90, TOKENS)

    def logits(cuts, threads):
        options = {"weights": "f32", "kv_dtype": kv_dtype, "context_length": 256, "threads": threads}
        slice_ = load_by_ggml(folder, 0, 6, **options)
        found = []
        for begin, end in itertools.pairwise([0, *cuts]):
            span = Span("a", begin, end - begin, TOKENS)
            batch = PackedBatch((span,), np.arange(end - begin, dtype=np.int64), token_ids=ids[begin:end])
            found.append(slice_.forward(batch).logits)
        slice_.close()
        return np.concatenate(found)

    whole = logits([TOKENS], 1)
    for cuts, threads in itertools.product(([*range(1, TOKENS + 1)], [31, 33, TOKENS - 1, TOKENS]), (1, 2)):
        np.testing.assert_array_equal(logits(cuts, threads), whole)
