"""Tiny random models of every family, saved as model folders; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 199
LAYER_COUNT = 6

# under every name that families use; each family takes those it knows
TINY_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYER_COUNT,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "n_embd": 64,
    "n_layer": LAYER_COUNT,
    "n_head": 4,
    "n_positions": 256,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_num_experts": 4,
}

# families whose shape does not follow from the common one
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    # latent attention: every head has its own K and V
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 64,  # the rotary part
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
    "minicpm3": {"num_key_value_heads": 4},
}

# with larger weights, two attention implementations of transformers differ by more than 1e-4
WEIGHT_SCALES = {"deepseek_v2": 0.05, "deepseek_v3": 0.05}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return the config of a tiny model of a family; `overrides` are config attributes."""
    from transformers import AutoConfig

    config_class = type(AutoConfig.for_model(model_type))
    known = set(config_class().to_dict())
    values = {name: value for name, value in TINY_CONFIG.items() if name in known}
    return config_class(**{**values, **FAMILY_CONFIG.get(model_type, {}), **overrides})


def make_tiny_model(
    folder: Path,
    model_type: str,
    *,
    tokenizer: bool = False,
    max_shard_size: str = "1GB",
    seed: int = 1,
    dtype: str = "float32",
    weight_scale: float | None = None,
    **config_overrides: Any,
) -> Path:
    """Save a tiny random model as config.json and safetensors into `folder`; return the folder.

    `weight_scale` is the standard deviation of matrices, by default one for a hidden size of 64.
    A small `max_shard_size` ("100KB") makes several shards and their index.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = tiny_config(model_type, **config_overrides)
    scale = weight_scale or WEIGHT_SCALES.get(model_type, 0.15)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.abs().sum() == 0:
                parameter.normal_(0, scale, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        make_tiny_tokenizer(folder, config.vocab_size)
    return folder


def tiny_llama_folder(folder: Path, **config_overrides: Any) -> Path:
    """Save a tiny llama with a byte-level tokenizer and a chat template: it takes any text, and every token has one."""
    return make_tiny_model(folder, "llama", tokenizer=True, **{"vocab_size": 300, **config_overrides})


def make_tiny_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer.json with every byte, a few merges and the special tokens, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2 as in TINY_CONFIG
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = ["the cat sat on the mat and the dog ran to the house in the rain", "noodle noodle user assistant system"]
    tokenizer.train_from_iterator(sample * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
