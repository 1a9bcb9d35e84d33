from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.numpy import load_file

from noodle.errors import ConfigurationError, UnsupportedModel
from services.coordinator.models.store import prepare_model
from services.stage.tools.convert import convert, main
from tests.support.models.tiny_gguf import TOKENS, TinyLlama, add_tokenizer, write_tiny_gguf
from tests.support.models.tiny_model import tiny_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def write_qwen2(path: Path, pre: str = "qwen2", **more: Any) -> Any:
    """A tiny qwen2 as llama.cpp would write it; the model comes back."""
    config = tiny_config("qwen2", vocab_size=len(TOKENS))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    writer = GGUFWriter(path, "qwen2")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in more.items():
        writer.add_string(f"qwen2.{key.replace('__', '.')}", value)
    add_tokenizer(writer, pre)
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, values in model.state_dict().items():
        module, suffix = name.rsplit(".", 1)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(f"{names.get_name(module)}.{suffix}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_another_family_computes_the_same_after_conversion(tmp_path: Path) -> None:
    model = write_qwen2(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    token_ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the 12 <think>").input_ids) == "the 12 <think>"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "out"}


def test_a_llama_is_the_same_as_the_model_stores(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama(pre="llama-bpe", tied=False))
    convert(path, tmp_path / "out")
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    ours = load_file(prepare_model(str(path), tmp_path / "cache", lambda _progress: None).folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_half_precision_is_half_the_bytes(tmp_path: Path) -> None:
    write_qwen2(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out", "float16")
    assert all(values.dtype == np.float16 for values in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda path: write_qwen2(path, rope__scaling__type="yarn"), "scales rotary positions"),
        (lambda path: write_qwen2(path, pre="seed-coder"), "splits text as 'seed-coder'"),
        (lambda path: write_tiny_gguf(path, TinyLlama(architecture="bert", pre="qwen2")), "bert"),
        (lambda path: write_tiny_gguf(path, TinyLlama(architecture="rwkv6", pre="qwen2")), "rwkv6"),
        (
            lambda path: write_tiny_gguf(
                path, TinyLlama(pre="qwen2", more_tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
            ),
            "leaves 1 tensors",
        ),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "not a readable GGUF"),
    ],
)
def test_what_can_not_be_converted_rightly_is_refused_by_name(tmp_path: Path, made: Any, said: str) -> None:
    path = tmp_path / "tiny.gguf"
    made(path)
    with pytest.raises(UnsupportedModel, match=said):
        convert(path, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.gguf"}


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama())
    with pytest.raises(ConfigurationError, match="not empty"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_as_a_command_it_says_what_is_wrong_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 1
    assert "There is no file" in capsys.readouterr().err
