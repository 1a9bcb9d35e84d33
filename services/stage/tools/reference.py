"""Compares what a cluster generated with the unsplit model, computed by transformers on the CPU.

A process for `noodle verify` (`python -m services.stage.tools.reference`): it reads a ReferenceQuestion from standard
input and writes ReferenceLines to standard output, the last one with the results (noodle/cluster/measuring.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from noodle.cluster.measuring import (
    Difference,
    GreedyAnswer,
    ProcessError,
    PromptResult,
    ReferenceLine,
    ReferenceQuestion,
)
from noodle.errors import ConfigurationError, ModelNotFound, NoodleError


def main() -> int:
    """Compare; after an error the last line describes it and the exit status is 1."""
    try:
        question = msgspec.json.decode(sys.stdin.buffer.read(), type=ReferenceQuestion)
        results = compare(question, lambda done: write_line(ReferenceLine(compared=done)))
    except NoodleError as error:
        write_line(ReferenceLine(error=ProcessError(error.message, error.cure)))
        return 1
    write_line(ReferenceLine(results=tuple(results)))
    return 0


def compare(question: ReferenceQuestion, compared: Callable[[int], None]) -> list[PromptResult]:
    """Compute each prompt with its tokens by the unsplit model; `compared` receives the number of finished prompts.

    Raises ConfigurationError without torch, ModelNotFound if the folder cannot be loaded.
    """
    model, tokenizer = _load(question)
    compared(0)
    results = []
    for answer in question.answers:
        prompt_ids = list(tokenizer(answer.prompt)["input_ids"])
        results.append(compare_tokens(model, prompt_ids, answer))
        compared(len(results))
    return results


def compare_tokens(model: Any, prompt_ids: list[int], answer: GreedyAnswer) -> PromptResult:
    """Compare each new token with the logits computed from the cluster's tokens before it."""
    import torch

    count = len(answer.token_ids)
    with torch.inference_mode():
        sequence = torch.tensor([[*prompt_ids, *answer.token_ids[:-1]]])
        logits = model(input_ids=sequence, use_cache=False).logits[0, -count:].float()
    chosen = torch.tensor(answer.token_ids)[:, None]
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
    errors = (logprobs - torch.tensor(answer.logprobs)).abs()
    best = logits.topk(2, dim=-1)
    gaps = best.values[:, 0] - logits.gather(1, chosen)[:, 0]
    # two tokens with exactly the best logit are both the most likely
    differences = tuple(
        Difference(
            index=index,
            token_id=answer.token_ids[index],
            best_token_id=int(best.indices[index, 0]),
            logit_gap=float(gaps[index]),
            two_best_gap=float(best.values[index, 0] - best.values[index, 1]),
        )
        for index in range(count)
        if float(gaps[index]) > 0
    )
    return PromptResult(len(prompt_ids), count, float(errors.max()), differences)


def load_whole_model(folder: Path, dtype: str, context_length: int, device: str = "cpu") -> Any:
    """Load transformers' unsplit model; raises ModelNotFound if the folder cannot be loaded."""
    import torch
    import transformers

    from services.stage.executors.transformers.rotary import fix_rotary

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The unsplit model cannot be loaded from {folder}: {error}") from error
    fix_rotary(model, context_length)
    return model.eval().to(device)


def _load(question: ReferenceQuestion) -> tuple[Any, Any]:
    try:
        import torch  # noqa: F401  # reports its absence before anything is loaded
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "Comparing needs torch and transformers, which are not installed here.",
            cure="Run `noodle verify` where a stage is installed (`make setup`, or noodle's extra `stage`).",
        ) from error
    folder = Path(question.folder)
    model = load_whole_model(folder, question.dtype, question.context_length)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The tokenizer cannot be loaded from {folder}: {error}") from error
    return model, tokenizer


def write_line(value: object) -> None:
    """Write a value as a line of JSON to standard output."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
