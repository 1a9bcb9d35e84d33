"""GGUF files computed by transformers: the logits of the folders that they were made of, or of their blocks' values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from noodle.errors import UnsupportedModel
from noodle.model.files import read_config
from services.stage.executors.transformers.gguf_families import GGUF_FAMILIES, only_ggml_computes
from services.stage.executors.transformers.loading import load_slice
from tests.support.converter.gguf_models import VOCAB_SIZE, convert_model, make_gguf_model
from tests.support.converter.quantized import quantized_gguf, rounded_folder
from tests.support.models.real_model import real_model_file, real_model_folder
from tests.support.models.tiny_gguf import TOKENS, TinyLlama, tiny_weights, write_tiny_gguf
from tests.support.sampling import sampled
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)
from tests.unit.stage.executors.ggml.test_gguf_families import LENGTHS, SWITCHES
from tests.unit.stage.executors.transformers.test_families import ORIGINAL_LENGTH, ROTARY_LENGTHS, ROTARY_STEPS

BOUND = 1e-4  # of the largest logit
CUTS = (0, 2, 3, 6)
# families of the converter's tests whose files transformers computes
FAMILIES = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite",
    "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
FAMILY_SWITCHES = [each for each in SWITCHES if each[0] in FAMILIES]
REFUSED = ("bitnet", "gpt_neox", "minicpm", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_slices_of_a_file_have_the_logits_of_its_blocks_values(
    kind: GGMLQuantizationType, tied: bool, tmp_path: Path
) -> None:
    shape = TinyLlama(tied=tied, dtype=kind)
    weights = tiny_weights(shape)
    path = write_tiny_gguf(tmp_path / "model.gguf", shape, weights)
    rounded = {
        name: dequantize(quantize(values, kind), kind).astype(np.float32)
        if values.ndim > 1 and kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        else values.astype(np.float16 if values.ndim > 1 and kind == GGMLQuantizationType.F16 else np.float32)
        for name, values in weights.items()
    }
    folder = _saved(tmp_path / "whole", shape, rounded)
    sessions = random_sessions(LENGTHS, len(TOKENS))
    got = SlicePipeline(path, (0, 1, 3)).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


def _saved(folder: Path, shape: TinyLlama, weights: dict[str, Any]) -> Path:
    import torch

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(values.astype(np.float32)) for name, values in weights.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if shape.tied else [])
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def test_only_a_slices_own_tensors_are_fetched_and_read(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", TinyLlama(dtype=GGMLQuantizationType.Q8_0))
    fetched: set[str] = set()
    middle = load_slice(
        path, 1, 2, device="cpu", dtype="bfloat16", context_length=64, fetch=lambda names: fetched.update(names)
    )
    assert fetched
    assert all(name.startswith("blk.1.") for name in fetched)
    rows = 2 * 64 + 2 * 32 + 2 * 96  # of q and output, of k and v, of gate and up, all 64 items long
    assert middle.bytes_read == (64 * rows + 96 * 64) // 32 * 34 + 2 * 64 * 4


def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    more = {"blk.1.attn_sinks.weight": np.ones(4, np.float32)}
    path = write_tiny_gguf(tmp_path / "model.gguf", TinyLlama(more_tensors=more))
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.attn_sinks\.weight.*make ggml"):
        load_slice(path, 0, 3, device="cpu", dtype="float32", context_length=64)


def test_which_files_transformers_computes_is_said_by_their_headers(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", TinyLlama())
    assert only_ggml_computes(path, read_config(path)) == ""
    assert only_ggml_computes(tmp_path, {"model_type": "mixtral"}) == ""
    assert (
        only_ggml_computes(path, {"num_local_experts": 8})
        == "model.gguf is a GGUF file of architecture llama with experts"
    )
    assert len(GGUF_FAMILIES) == len(FAMILIES) - 1  # Mistral's files are of architecture llama


@pytest.mark.family
@sampled("model_type", FAMILIES, {"gemma3_text", "llama", "phi3", "qwen2"})
def test_a_converted_file_has_the_logits_of_its_folder(model_type: str, tmp_path: Path) -> None:
    folder = make_gguf_model(tmp_path / "model", model_type)
    path = convert_model(folder, tmp_path / "model.gguf")
    sessions = random_sessions(LENGTHS, VOCAB_SIZE)
    got = SlicePipeline(path, CUTS).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND


@pytest.mark.family
@sampled(("model_type", "switches"), FAMILY_SWITCHES, FAMILY_SWITCHES[:1])
def test_what_differs_within_a_family_is_read_from_the_header(
    model_type: str, switches: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_gguf_model(tmp_path / "model", model_type, **switches)
    path = convert_model(folder, tmp_path / "model.gguf")
    sessions = random_sessions(ROTARY_LENGTHS, VOCAB_SIZE)
    compared = 1 if switches.get("rope_parameters", {}).get("rope_type") == "longrope" else len(sessions)
    pipeline = SlicePipeline(path, CUTS, context_length=4 * ORIGINAL_LENGTH)
    got = pipeline.run(sessions, ROTARY_STEPS)[:compared]  # noodle's factors follow from the promised length alone
    assert relative_difference(got, unsplit_logits(folder, sessions[:compared])) < BOUND


@pytest.mark.family
@sampled("model_type", REFUSED, {"mixtral"})
def test_a_file_that_does_not_map_plainly_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    path = convert_model(make_gguf_model(tmp_path / "model", model_type), tmp_path / "model.gguf")
    assert only_ggml_computes(path, read_config(path)).startswith("model.gguf is a GGUF file of architecture ")
    with pytest.raises(UnsupportedModel, match="which transformers does not compute"):
        load_slice(path, 0, 6, device="cpu", dtype="float32", context_length=64)


@pytest.mark.family
@sampled("kind", ["Q4_K", "Q8_0"], {"Q4_K"})
def test_blocks_are_computed_as_the_values_that_they_stand_for(kind: str, tmp_path: Path) -> None:
    folder = make_gguf_model(tmp_path / "model", "qwen3")
    path = quantized_gguf(convert_model(folder, tmp_path / "f32.gguf"), tmp_path / "quantised.gguf", kind)
    rounded = rounded_folder(folder, tmp_path / "rounded", kind)
    sessions = random_sessions(LENGTHS, VOCAB_SIZE)
    got = SlicePipeline(path, CUTS).run(sessions, STEPS)
    assert relative_difference(got, unsplit_logits(rounded, sessions)) < BOUND


@pytest.mark.model
def test_the_default_models_file_has_the_logits_that_transformers_computes_from_its_own_reading() -> None:
    folder, path = real_model_folder(), real_model_file()
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Write a short story about a lighthouse.").ids
    sessions = [np.array(ids, np.int64)]
    got = SlicePipeline(path, (0, 11, 30), context_length=8192).run(sessions, [[(0, len(ids) - 2)], [(0, 1)], [(0, 1)]])
    assert relative_difference(got, unsplit_logits(folder, sessions)) < BOUND
