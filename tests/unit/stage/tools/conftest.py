"""A tiny model, and what transformers makes of a text with it."""

from pathlib import Path

import pytest

from noodle.cluster.measuring import GreedyAnswer
from tests.support.models.tiny_model import tiny_llama_folder

TEXT = "the cat sat on"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("reference") / "model")


@pytest.fixture(scope="module")
def answered(folder: Path) -> GreedyAnswer:
    """What the unsplit model itself makes of the text, token by token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt_ids = list(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    ids, token_ids, logprobs = list(prompt_ids), [], []
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], dim=-1)
            token_ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            ids.append(token_ids[-1])
    return GreedyAnswer(TEXT, tuple(prompt_ids), tuple(token_ids), tuple(logprobs))
