"""The unsplit model as transformers computes it: the reference for everything that noodle computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class WholeModel:
    """generate() and logits of transformers, in float32 on one thread."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import torch
        import transformers

        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._generated: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.model = model.eval()
        self.model.generation_config.do_sample = False
        for name in ("temperature", "top_p", "top_k"):
            setattr(self.model.generation_config, name, None)

    def generate(self, prompt_ids: Sequence[int], new_tokens: int, *, ignore_end: bool = False) -> list[int]:
        """Return greedy token ids after the prompt."""
        torch = self._torch
        ids = torch.tensor([list(prompt_ids)])
        ends = {"eos_token_id": None} if ignore_end else {}
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **ends,
            )
        return [int(token) for token in output[0, len(prompt_ids) :]]

    def generate_once(self, prompt_ids: tuple[int, ...], new_tokens: int) -> list[int]:
        """Return what `generate` does, computed once for each prompt."""
        key = (prompt_ids, new_tokens)
        if key not in self._generated:
            self._generated[key] = self.generate(prompt_ids, new_tokens)
        return self._generated[key]

    def best_two_gap(self, token_ids: Sequence[int]) -> float:
        """Return the difference of the two largest logits after these tokens."""
        torch = self._torch
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0, -1]
        best, second = torch.topk(logits, 2).values.tolist()
        return float(best - second)

    def log_probabilities(self, token_ids: Sequence[int]) -> Any:
        """Return [tokens, vocabulary]: row p holds those of the token after position p."""
        torch = self._torch
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)
