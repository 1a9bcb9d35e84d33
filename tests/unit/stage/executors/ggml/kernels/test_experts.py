"""The experts of a slice, as noodle's kernels compute them: the same in any company, and safe with any numbers."""

import numpy as np
import pytest

from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import PackedBatch, Span
from services.stage.executors.ggml.loading import load_ggml_slice
from tests.support.models.tiny_model import make_tiny_model, tiny_config
from tests.support.stages.executors import need_ggml

TOKENS = np.arange(3, 63)


@pytest.fixture(scope="module", autouse=True)
def ggml_is_here():
    need_ggml()


def model(folder, family="qwen3_moe"):
    """A model whose experts are more than ggml's sort orders by insertion."""
    config = tiny_config(family)
    wanted = {"moe_intermediate_size": 64, "hidden_size": 64, "n_routed_experts": 20, "num_local_experts": 20}
    known = {name: value for name, value in wanted.items() if hasattr(config, name)}
    return make_tiny_model(folder, family, **known)


def loaded(folder, threads, weights="q8_0", begin=0):
    return load_ggml_slice(folder, begin, 6, weights=weights, context_length=256, threads=threads)


def forward(loaded_slice, counts):
    """The logits of every token; spans of these token counts, each of a session of its own."""
    spans = tuple(Span(f"{counts} {number}", 0, count, count) for number, count in enumerate(counts))
    total = sum(counts)
    return loaded_slice.forward(PackedBatch(spans, np.arange(total), token_ids=TOKENS[:total])).logits


@pytest.mark.parametrize(
    ("family", "weights"),
    [("qwen3_moe", "q8_0"), ("qwen2_moe", "f16"), ("deepseek_v3", "q8_0"), ("gpt_oss", "q4_0"), ("phimoe", "f32")],
)
def test_a_session_has_the_same_logits_alone_and_in_any_company(family, weights, tmp_path):
    """Routers, shared experts, biases and groups of experts included."""
    folder = model(tmp_path, family)
    alone = loaded(folder, 1, weights)
    spans = [Span(f"{token}", 0, 1, 1) for token in range(40)]
    batches = [PackedBatch((span,), np.arange(1), token_ids=TOKENS[[token]]) for token, span in enumerate(spans)]
    each = np.concatenate([alone.forward(batch).logits for batch in batches])
    alone.close()
    for threads in (1, 5):
        together = loaded(folder, threads, weights)
        for count in (2, 7, 40):
            np.testing.assert_array_equal(forward(together, (1,) * count), each[:count])
        together.close()


def test_a_token_whose_router_gives_no_numbers_leaves_others_as_they_are(tmp_path):
    """ggml's sort would write outside of its row."""
    last = loaded(model(tmp_path), 2, begin=4)
    hidden = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    expected = from_hidden(last, hidden, "right")
    hidden[2] = np.nan
    found = from_hidden(last, hidden, "wrong")
    assert np.isnan(found[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(found[others], expected[others])


def from_hidden(last, hidden, name):
    """The logits of sessions with one token each, from hidden states before the last layers."""
    spans = tuple(Span(f"{name} {number}", 0, 1, 1) for number in range(len(hidden)))
    tensor = ActivationTensor("float32", hidden.shape, hidden.data.cast("B"))
    return last.forward(PackedBatch(spans, np.arange(len(hidden)), hidden_states=tensor)).logits
