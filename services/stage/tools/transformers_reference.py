"""Compares what a cluster generated with the unsplit model, computed by transformers on the CPU.

A process for `noodle verify` (`python -m services.stage.tools.transformers_reference`), which speaks as
services/stage/tools/reference.py does. It runs where torch and transformers are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noodle.cluster.measuring import GreedyAnswer, PromptResult, ReferenceLine, ReferenceQuestion
from noodle.errors import GenerationFailed, ModelNotFound, UnsupportedModel
from noodle.metrics.machine import machine_use
from noodle.model.files import read_tensor_entries
from services.stage.tools.reference import compare_logits, main, write_line

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def compare_with_transformers(question: ReferenceQuestion, compared: Callable[[int], None]) -> list[PromptResult]:
    """Compute each prompt with its tokens; `compared` receives the number of finished prompts.

    A folder's tokenizer must make the cluster's tokens of each prompt. Raises ModelNotFound if the model cannot be
    loaded, UnsupportedModel if transformers does not read its file, GenerationFailed for other tokens.
    """
    path = Path(question.model)
    _check_memory(path, question.dtype)
    model = load_whole_model(path, question.dtype, question.context_length)
    if path.is_dir():
        _check_tokens(path, question)
    compared(0)
    results = []
    for answer in question.answers:
        results.append(compare_tokens(model, answer))
        compared(len(results))
    return results


def compare_tokens(model: Any, answer: GreedyAnswer) -> PromptResult:
    """Compare each new token with the logits computed from the cluster's tokens before it."""
    import torch

    with torch.inference_mode():
        sequence = torch.tensor([[*answer.prompt_ids, *answer.token_ids[:-1]]])
        logits = model(input_ids=sequence, use_cache=False).logits[0, -len(answer.token_ids) :].float()
    return compare_logits(logits.numpy(), answer)


def load_whole_model(path: Path, dtype: str, context_length: int, device: str = "cpu") -> Any:
    """Load transformers' unsplit model from a folder or a GGUF file, whose blocks become `dtype`.

    Raises ModelNotFound if a folder cannot be loaded, UnsupportedModel if transformers does not read a GGUF file, or
    lacks the package of a quantized folder's method.
    """
    import torch
    import transformers

    from services.stage.executors.transformers.rotary import fix_rotary

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if path.is_file():
        model = _load_gguf(path, dtype)
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
            )
        except ImportError as error:
            raise UnsupportedModel(f"transformers cannot read {path} here ({error}).") from error
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"The unsplit model cannot be loaded from {path}: {error}") from error
    fix_rotary(model, context_length)
    return model.eval().to(device)


def _load_gguf(path: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        with no_init_weights():  # on no meta device, since no file has the buffers
            model = AutoModelForCausalLM.from_config(config)
        # from_pretrained(gguf_file=) does the same, but needs the package accelerate
        loaded = load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=model, torch_dtype=getattr(torch, dtype)
        )
        tensors: dict[str, torch.Tensor] = loaded["tensors"]
        missing = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tensors.keys()
        missing -= set(model.all_tied_weights_keys)
        if missing:
            raise UnsupportedModel(f"transformers finds no weights for {min(missing)} in {path}.")
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
    # transformers raises each of these for a file that it cannot read
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError, ImportError) as error:
        raise UnsupportedModel(f"transformers cannot read {path} ({type(error).__name__}: {error}).") from error
    return model


def _check_memory(model: Path, dtype: str) -> None:
    """Refuse a model that does not fit into the memory that is free."""
    needed_bytes = ITEM_BYTES[dtype] * sum(entry.item_count for entry in read_tensor_entries(model).values())
    machine = machine_use()
    if machine is not None and needed_bytes > machine.available_bytes:
        raise UnsupportedModel(
            f"transformers needs {needed_bytes / 1e9:.1f} GB for this model in {dtype}, "
            f"and {machine.available_bytes / 1e9:.1f} GB are free."
        )


def _check_tokens(folder: Path, question: ReferenceQuestion) -> None:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The tokenizer cannot be loaded from {folder}: {error}") from error
    for answer in question.answers:
        if tuple(tokenizer(answer.prompt)["input_ids"]) != answer.prompt_ids:
            raise GenerationFailed(
                f"The cluster's tokenizer makes other tokens of {answer.prompt[:40]!r} than the unsplit model's.",
                cure="Check that NOODLE_MODEL names the model that the cluster serves.",
            )


def _compare_or_say_why_not(question: ReferenceQuestion, compared: Callable[[int], None]) -> list[PromptResult]:
    try:
        return compare_with_transformers(question, compared)
    except UnsupportedModel as error:
        write_line(ReferenceLine(unable=str(error)))
        return []


if __name__ == "__main__":
    sys.exit(main(_compare_or_say_why_not))
