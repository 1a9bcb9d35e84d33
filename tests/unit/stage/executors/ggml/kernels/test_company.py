"""A whole model gives a token the same logits, bit for bit, in any chunks, company, threads and slices (design D16)."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from noodle.errors import GenerationFailed
from noodle.wire.messages import SamplingParameters
from services.stage.worker.sampler import sample
from tests.support.converter.gguf_models import VOCAB_SIZE, make_gguf_model
from tests.support.models.real_files import GEMMA_3
from tests.support.models.real_model import real_model_file
from tests.support.models.tiny_model import LAYER_COUNT
from tests.support.sampling import sampled
from tests.support.stages.company import Company
from tests.support.stages.executors import need_ggml
from tests.support.stages.slice_pipeline import random_sessions

LENGTHS = (70, 9, 23, 1, 40, 5, 14, 33, 2)  # one session and eight others
# what each family adds: windows and soft caps, experts, sinks, latent attention, learned positions, parallel layers
FAMILIES = (
    "llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen3_moe", "gpt2", "gpt_oss", "phi3", "cohere2",
    "deepseek_v3", "mixtral", "glm4_moe", "granite", "stablelm", "minicpm3",
)  # fmt: skip
FORMATS = (("stored", "f16"), ("q8_0", "f16"), ("q4_K", "f16"), ("q4_0", "q8_0"), ("f16", "f32"), ("f32", "f32"))
CASES = [("llama", *each) for each in FORMATS] + [
    (family, *FORMATS[index % 3]) for index, family in enumerate(FAMILIES[1:])
]
SAMPLE = {CASES[2], CASES[0]} | {case for case in CASES if case[0] in {"gemma3_text", "deepseek_v3", "gpt_oss"}}


@pytest.fixture(autouse=True)
def ggml_is_here():
    need_ggml()


@pytest.mark.family
@sampled(("model_type", "weights", "kv_dtype"), CASES, SAMPLE)
def test_a_model_gives_a_token_the_same_logits_in_any_company(model_type, weights, kv_dtype, tmp_path):
    model = make_gguf_model(tmp_path / "model", model_type)
    sessions = random_sessions(LENGTHS, VOCAB_SIZE)
    company = Company(
        model, LAYER_COUNT, sessions, weights=weights, kv_dtype=kv_dtype, context_length=128, cache_dir=tmp_path
    )
    assert all(np.isfinite(each).all() for each in company.alone)
    for chunk, threads in ((64, 1), (3, 2), (1, 1)):
        company.check_chunks(chunk, threads)
    for seed, (cuts, threads) in enumerate((((0, 6), 2), ((0, 2, 6), 1), ((0, 1, 4, 6), 5))):
        company.check_company(cuts, threads, seed)
    for kept, rest in ((64, 64), (33, 5), (69, 1), (16, 1)):
        company.check_reused_beginning(kept, rest)


@pytest.mark.model
@pytest.mark.parametrize("name", ["the default model", GEMMA_3.name])
def test_a_real_file_as_it_is_gives_a_token_the_same_logits_in_any_company(name):
    """The default model's Q4_1; Q4_K with Q5_0, Q6_K and Q8_0 beside it, and windows."""
    path, layers = (real_model_file(), 30) if name == "the default model" else (GEMMA_3.path(), 18)
    sessions = random_sessions((70, 9, 23, 1, 5), 40_000)
    company = Company(path, layers, sessions, weights="stored", kv_dtype="f16", context_length=128)
    company.check_chunks(64)
    company.check_chunks(3, 2)
    company.check_chunks(1, 2)
    company.check_company((0, layers), 2, 0)
    company.check_company((0, 5, 11, layers), 1, 1)
    company.check_reused_beginning(33, 5)
    company.check_reused_beginning(69, 1)


@pytest.mark.family
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_oss"])
def test_a_weight_that_is_no_number_spoils_logits_and_nothing_else(model_type, tmp_path):
    """Also where experts are chosen by scores that are no numbers; the sampler then refuses the step by name."""
    model = make_gguf_model(tmp_path / "model", model_type)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.weight"][3] = np.nan
    save_file(tensors, path, {"format": "pt"})
    sessions = random_sessions((40, 5), VOCAB_SIZE)
    company = Company(model, LAYER_COUNT, sessions, weights="q8_0", kv_dtype="f16", context_length=128)
    company.check_chunks(1, 2)
    assert all(np.isnan(each).all() for each in company.alone)
    with pytest.raises(GenerationFailed, match="not finite"):
        sample(company.alone[0][0], SamplingParameters(), 0, False)
