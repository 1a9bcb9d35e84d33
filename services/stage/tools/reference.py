"""The unsplit model, computed by transformers on the CPU: feeds it what a cluster generated and says how far it is off.

A process for `noodle verify` (`python -m services.stage.reference`): one JSON object on standard input, JSON lines on
standard output, the last one with the results. Knows no cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from noodle.errors import ConfigurationError, ModelNotFound, NoodleError

if TYPE_CHECKING:
    import torch


class Answered(Struct, frozen=True):
    """A prompt and what a cluster made of it, greedily."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each of these tokens, by the cluster


class Question(Struct, frozen=True):
    """What is to be compared."""

    folder: str
    dtype: str  # float32, float16 or bfloat16
    context_length: int  # that the cluster promises: it fixes longrope's frequencies
    prompts: tuple[Answered, ...]


class Difference(Struct, frozen=True):
    """A token that is not the reference's likeliest; see services/cli/verify/bounds.py, which reads this."""

    index: int
    token_id: int
    best_token_id: int
    logit_gap: float
    two_best_gap: float


class Result(Struct, frozen=True):
    """One prompt's comparison."""

    prompt_tokens: int
    tokens: int
    largest_logprob_error: float
    differences: tuple[Difference, ...]


def main() -> int:
    """Compare; exit status 1 after an error, which is the last line then."""
    try:
        question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
        results = compare(question, lambda done: _say({"compared": done}))
    except NoodleError as error:
        _say({"error": {"message": error.message, "cure": error.cure}})
        return 1
    _say({"results": msgspec.to_builtins(results)})
    return 0


def compare(question: Question, compared: Callable[[int], None]) -> list[Result]:
    """Feed each prompt with its tokens to the unsplit model; `compared` is told how many are done.

    Raises ConfigurationError without torch, ModelNotFound when the folder can not be loaded.
    """
    model, tokenizer = _load(question)
    compared(0)
    results = []
    for answered in question.prompts:
        prompt_ids = list(tokenizer(answered.text)["input_ids"])
        results.append(compare_tokens(model, prompt_ids, answered))
        compared(len(results))
    return results


def compare_tokens(model: Any, prompt_ids: list[int], answered: Answered) -> Result:
    """The logits at every new token, given all tokens before it as the cluster has them."""
    import torch

    count = len(answered.token_ids)
    with torch.inference_mode():
        sequence = torch.tensor([[*prompt_ids, *answered.token_ids[:-1]]])
        logits = model(input_ids=sequence, use_cache=False).logits[0, -count:].float()
    chosen = torch.tensor(answered.token_ids)[:, None]
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
    errors = (logprobs - torch.tensor(answered.logprobs)).abs()
    best = logits.topk(2, dim=-1)
    gaps = best.values[:, 0] - logits.gather(1, chosen)[:, 0]
    # two tokens with exactly the best logit are both the likeliest
    differences = tuple(_difference(index, answered, best, gaps) for index in range(count) if float(gaps[index]) > 0)
    return Result(len(prompt_ids), count, float(errors.max()), differences)


def _difference(index: int, answered: Answered, best: torch.return_types.topk, gaps: torch.Tensor) -> Difference:
    first, second = best.values[index].tolist()
    return Difference(
        index, answered.token_ids[index], int(best.indices[index, 0]), float(gaps[index]), float(first - second)
    )


def load_whole_model(folder: Path, dtype: str, context_length: int, device: str = "cpu") -> Any:
    """transformers' own unsplit model, ready to compute; raises ModelNotFound when the folder can not be loaded."""
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
        raise ModelNotFound(f"The unsplit model can not be loaded from {folder}: {error}") from error
    fix_rotary(model, context_length)
    return model.eval().to(device)


def _load(question: Question) -> tuple[Any, Any]:
    try:
        import torch  # noqa: F401  # looked for here, so that its absence is said before anything is loaded
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
        raise ModelNotFound(f"The tokenizer can not be loaded from {folder}: {error}") from error
    return model, tokenizer


def _say(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
